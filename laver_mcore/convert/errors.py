"""The error of everything in this package."""

from laver_mcore.config.errors import ConfigError


class ConversionError(ConfigError):
    """Weights that cannot be converted or loaded; the message is one line."""
