"""Tests that take minutes: left out unless LAVER_LONG is set, as `make test-long` does."""

import os

import pytest

LONG = pytest.mark.skipif("LAVER_LONG" not in os.environ, reason="minutes of them; `make test-long`")
