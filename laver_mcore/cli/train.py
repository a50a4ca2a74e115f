"""Train a vision-language model with latent visual reconstruction: `torchrun pretrain_laver.py --config RECIPE`.

The same program serves a laptop (one process, CPU), one GPU and a cluster. `--help` lists every flag.
"""

from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse, to_yaml
from laver_mcore.megatron.environment import prepare_for_gpus


def main(argv: list[str]) -> int:
    """Parse, build, run, close. Returns 0, 1 for training that cannot go on, or 2 for input that cannot run."""
    try:
        config, actions = parse(argv)
        if actions.print_config:
            print(to_yaml(config), end="")
            return 0
    except ConfigError as error:
        return refuse(error)
    prepare_for_gpus(config.parallel)
    # Imported here: `--help` and a misspelt flag should not wait for torch and Megatron.
    from laver_mcore.cli.dry_run import dry_run
    from laver_mcore.cli.run import run
    from laver_mcore.data.errors import DataError
    from laver_mcore.megatron.checkpoints import SaveError
    from laver_mcore.train.skips import DivergedError

    try:
        return dry_run(config) if actions.dry_run else run(config)
    except (ConfigError, DataError) as error:
        return refuse(error)
    except (SaveError, DivergedError) as error:
        return refuse(error, status=1)
