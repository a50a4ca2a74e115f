"""Megatron-style training of vision-language models whose visual tokens have their own supervision (LaVer)."""

from laver_mcore.megatron.jit import start_without_the_compiler

__version__ = "0.1.0"

start_without_the_compiler()  # before anything imports Megatron-Core
