"""`laver inspect` from a checkout, installed or not: laver_mcore/cli/inspect_checkpoint.py."""

import checkout  # noqa: F401

from laver_mcore.cli.main import script

if __name__ == "__main__":  # workers import this file again
    script("inspect")
