"""Train and list where a step makes the host wait for the device: `sync_worker.py OUTPUT ARGUMENTS...`.

On a GPU torch itself reports every synchronisation. On CPU the operations that would need one are counted, where they
are called from our own code or from Megatron's; the reference kernels, which run on CPU only, are left out.
Whole numbers that a stage receives from another are counted as well: nobody but the host reads them.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "is_nonzero",
    "equal",
)
PROJECT = ("laver_mcore", "laver_kernels", "megatron")
ON_CPU_ONLY = ("blocked.py", "intervals.py", "api.py")
"""The kernels' references, and their checks of values that they do not look at on a GPU."""
WARM_UP = 2


def _caller() -> str:
    """The innermost frame of the stack that is ours or Megatron's."""
    for frame in reversed(traceback.extract_stack()):
        # cpu.py stands between every call and torch where there is no GPU.
        if any(f"/{name}/" in frame.filename for name in PROJECT) and Path(frame.filename).name != "cpu.py":
            return (
                f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno} {frame.line}"
            )
    return "?"


class _Count(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if (
            name.startswith(WAITING)
            or (name.startswith("index.") and _has_mask(args))
            or (name.startswith("c10d.recv_") and not args[0][0].is_floating_point())
        ):
            caller = _caller()
            if not any(f"/{place}:" in caller for place in ON_CPU_ONLY):
                self._found.append(f"{name} at {caller}")
        return func(*args, **(kwargs or {}))


def _has_mask(args) -> bool:
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])


class Watched:
    """`train_step`, watched from the third step on."""

    def __init__(self, train_step) -> None:
        self._train_step = train_step
        self.num_steps = 0
        self.found: list[str] = []

    def __call__(self, engine, batches, iteration, *timers):
        self.num_steps += 1
        if self.num_steps <= WARM_UP:
            return self._train_step(engine, batches, iteration, *timers)
        if engine.topology.device.type != "cuda":
            with _Count(self.found):
                return self._train_step(engine, batches, iteration, *timers)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = lambda message, *_: self.found.append(f"{message} at {_caller()}")
                return self._train_step(engine, batches, iteration, *timers)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def main(output: str, argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    from laver_mcore.cli.run import train_run
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train import loop

    device = parallel.init_distributed(timeout_minutes=2)
    config, _ = parse(argv)
    loop.train_step = watched = Watched(loop.train_step)
    train_run(config, device)
    found = [line for line in watched.found if "synchroniz" in line or device.type != "cuda"]
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    everywhere = [line for rank in ranks for line in rank]
    if dist.get_rank() == 0:
        Path(output).write_text(
            json.dumps({"device": device.type, "num_steps": watched.num_steps - WARM_UP, "found": everywhere})
        )
    parallel.shut_down()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
