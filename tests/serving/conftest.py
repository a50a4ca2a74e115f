"""Tests that start a server, only where LAVER_VLLM names the environment that `make serve-test` makes."""

import os

if "LAVER_VLLM" not in os.environ:
    collect_ignore = ["test_vllm.py"]
