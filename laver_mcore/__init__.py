"""Megatron-style training of vision-language models whose visual tokens have their own supervision (LaVer)."""

__version__ = "0.1.0"
