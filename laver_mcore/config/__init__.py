"""Typed configuration: dataclasses, YAML recipes, command line, cross-field checks."""
