"""The one exception for data that a user has to change."""


class DataError(ValueError):
    """Data that cannot be trained on; its text is one line: what was found, what was wanted, the fix."""
