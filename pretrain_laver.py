"""Train a vision-language model with latent visual reconstruction: `torchrun pretrain_laver.py --config RECIPE`.

The same program serves a laptop (one process, CPU), one GPU and a cluster. `--help` lists every flag.
"""

import os
import sys
import time
import warnings

from laver_mcore.config.checks import ConfigError
from laver_mcore.config.load import parse, to_yaml


def main(argv: list[str]) -> int:
    """Parse, build, run, close. Returns the exit status: 0, or 2 for input that cannot run."""
    try:
        config, actions = parse(argv)
        if actions.print_config:
            print(to_yaml(config), end="")
            return 0
    except ConfigError as error:
        return _refuse(error)
    # Megatron warns of every optional library that is missing; ours says once what it uses instead.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    # Imported here: `--help` and a misspelt flag should not wait for torch and Megatron.
    from laver_mcore.data.errors import DataError
    from laver_mcore.dry_run import dry_run
    from laver_mcore.run import run

    try:
        return dry_run(config) if actions.dry_run else run(config)
    except (ConfigError, DataError) as error:
        return _refuse(error)


def _refuse(error: Exception) -> int:
    """Say on one rank what is wrong, in one line; every rank finds the same fault."""
    if os.environ.get("RANK", "0") == "0":
        print(f"pretrain_laver.py: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun stops all ranks when the first one leaves: let rank 0 speak
    return 2


if __name__ == "__main__":  # Megatron's checkpoint writer spawns a process that imports this file again
    sys.exit(main(sys.argv[1:]))
