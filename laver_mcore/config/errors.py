"""The error of a recipe, and of everything that follows from one."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line with what was given, wanted, and a way out."""
