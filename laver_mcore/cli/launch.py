"""`laver train --nproc-per-node 8 ...`: torchrun's own launcher under a command of ours, without its traces.

torchrun prints some forty lines behind the one in which a run says why it cannot start. Here that line is all there is,
and the exit status is the run's own.
"""

import argparse
import logging
import os

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser

LAUNCHED = ("train", "answer")
"""Commands that run on several processes."""


def split(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(torchrun's flags, the command's own); without `nproc_per_node` the command runs as it is."""
    parser = FlagParser(None, add_help=False)
    parser.add_argument("--nproc-per-node")
    parser.add_argument("--nnodes", default="1")
    for name in ("node-rank", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "master-addr", "master-port"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--max-restarts", default="0")
    return parser.parse_known_args(argv)


def launch(name: str, flags: argparse.Namespace, rest: list[str]) -> int:
    """Run a command in processes that torchrun starts and watches; returns the exit status of the first to fail."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun does so in any case, with five lines about it
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "540")  # a run that is told to stop saves first
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    given = {key.replace("_", "-"): value for key, value in vars(flags).items() if value is not None}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    alone = flags.nnodes == "1" and flags.master_addr is None and flags.rdzv_endpoint is None
    words += ["--standalone"] if alone else []
    try:
        run.run(run.parse_args([*words, "-m", "laver_mcore", name, *rest]))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as error:
        return 128 + int(error.sigval)
    except ValueError as error:  # a flag of torchrun's that it cannot read
        return refuse(str(error).splitlines()[0])
    return 0
