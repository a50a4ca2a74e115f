"""Arithmetic on a recipe: how many parameters, floating-point operations and bytes it takes. Imports no Megatron."""
