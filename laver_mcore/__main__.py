"""`python -m laver_mcore COMMAND` and, on several processes, `torchrun ... -m laver_mcore COMMAND`."""

from laver_mcore.cli.main import laver

if __name__ == "__main__":  # spawned processes import this file again
    laver()
