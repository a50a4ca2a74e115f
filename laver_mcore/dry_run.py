"""`--dry-run`: build and validate everything, print parameters and memory per rank, train nothing."""

from laver_mcore.config.schema import Config


def dry_run(config: Config) -> int:
    raise NotImplementedError
