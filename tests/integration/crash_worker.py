"""`pretrain_laver.py` whose first rank fails in the middle of its third step, while the others wait for it."""

import torch.distributed as dist

from laver_mcore.cli.console import run_and_leave
from laver_mcore.cli.run import run
from laver_mcore.config.load import parse
from laver_mcore.train import loop

original, calls = loop.train_step, []


def failing(*args, **settings):
    calls.append(0)
    if dist.get_rank() == 0 and len(calls) == 3:
        raise RuntimeError("a crash on one rank")
    return original(*args, **settings)


if __name__ == "__main__":
    loop.train_step = failing
    run_and_leave(lambda argv: run(parse(argv)[0]))
