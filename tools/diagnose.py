"""`laver diagnose` from a checkout, installed or not: laver_mcore/cli/diagnose.py."""

import checkout  # noqa: F401

from laver_mcore.cli.main import script

if __name__ == "__main__":  # workers import this file again
    script("diagnose")
