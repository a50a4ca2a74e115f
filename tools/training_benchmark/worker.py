"""One arm in a process of its own, told what to do line by line: `python -m tools.training_benchmark.worker ARM`.

Reads JSON lines from stdin and answers each with one on stdout:

    {"do": "build", "setting": {...}}   {"do": "losses"}   {"do": "steps", "count": 3, "move_teacher": false}
    {"do": "memory"}   {"do": "count"}   {"do": "profile", "rows": 20}
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

PROCESS = "process"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


class Worker:
    """The commands, and the contender that they are about."""

    def __init__(self, arm: Any) -> None:
        self._arm = arm
        self._contender: Any = None
        self._next = 0
        self._base_bytes = 0

    def build(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Random weights on the device."""
        import torch

        from laver_mcore.megatron import parallel
        from tools.training_benchmark import arms
        from tools.training_benchmark.setting import Setting

        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self._arm != "released":
            self._device = parallel.init_distributed()
        self._base_bytes = resident_bytes("VmRSS")
        self._contender = arms.build(self._arm, Setting(**setting), self._device)
        return {}

    def losses(self) -> dict[str, Any]:
        """Take the first step and say what its losses were."""
        assert self._next == 0, "the first step was taken already"
        return vars(self._contender.losses(self._step(False)))

    def steps(self, count: int, move_teacher: bool = False) -> dict[str, Any]:
        """Seconds of each of so many further steps."""
        clock = time.process_time if self.clock == PROCESS else time.perf_counter
        seconds = []
        for _ in range(count):
            started = clock()
            self._step(move_teacher)
            self._wait()
            seconds.append(clock() - started)
        return {"seconds": seconds, "clock": self.clock}

    @property
    def clock(self) -> str:
        """On one CPU thread the time that this process computed: other work on the machine does not count."""
        import torch

        return PROCESS if self._device.type == "cpu" and torch.get_num_threads() == 1 else "wall"

    def memory(self) -> dict[str, Any]:
        """Peak bytes so far: torch's own count on a GPU, else what the process grew by since before the build."""
        import torch

        if self._device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated()}
        return {"peak_bytes": resident_bytes("VmHWM") - self._base_bytes}

    def count(self) -> dict[str, Any]:
        """FLOPs of one step as torch counts the matrix products that run; none on a GPU, where it misses kernels."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

        if self._device.type == "cuda":
            return {"flops": None}
        # torch knows no formula for its attention on a CPU.
        attention = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
                sdpa_flop_count(q, k, v)
            ),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
                sdpa_backward_flop_count(g, q, k, v)
            ),
        }
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            self._step(False)
        return {"flops": counter.get_total_flops()}

    def profile(self, rows: int) -> dict[str, Any]:
        """torch.profiler's table of one step."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        with profile(activities=kinds, record_shapes=True) as found:
            self._step(False)
            self._wait()
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        return {"table": found.key_averages().table(sort_by=order, row_limit=rows)}

    def _step(self, move_teacher: bool) -> Any:
        result = self._contender.step(self._next, move_teacher)
        self._next += 1
        return result

    def _wait(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}; memory is measured on Linux alone")


def serve(arm: str, answers: TextIO) -> None:
    """Obey until stdin ends."""
    worker = Worker(arm)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Keep stdout for the answers; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    serve(sys.argv[1], answers)


if __name__ == "__main__":
    main()
