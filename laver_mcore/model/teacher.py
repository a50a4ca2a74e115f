"""The EMA teacher: an fp32 average of the decoder and the vision head, by name, on this rank's model shards.

There is no second module tree. The teacher's forward runs the student's modules with the teacher's weights swapped
in; it shares the vision encoder and the connector, which have no average (LaVer, arXiv 2512.06281, section 3.2).
The average must be fp32: over 1,000 steps at momentum 0.996 it covers 98.2 % of the way to a fixed student, in
bfloat16 1.3 % at best.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from laver_kernels import ema_update_
from laver_mcore.model.laver import LaverModel
from laver_mcore.model.parameters import named_parameters
from laver_mcore.parallel import Topology

AVERAGED = ("language_model.", "vision_head.")


class TeacherError(RuntimeError):
    """The teacher did not move although it should have."""


class Teacher:
    """EMA of the student's fp32 weights; `averages` maps a parameter's local shard to its fp32 average."""

    def __init__(self, chunks: list[LaverModel], topology: Topology, kernels: str = "auto") -> None:
        self._topology = topology
        self._kernels = kernels
        self._items = [item for item in named_parameters(chunks, topology) if item.name.startswith(AVERAGED)]
        self.averages: dict[torch.nn.Parameter, torch.Tensor] = {
            item.parameter: item.parameter.detach().float().clone() for item in self._items
        }
        # In fp32 the average computes itself; in bf16 its rounded copy does.
        self._compute: dict[torch.nn.Parameter, torch.Tensor] = {
            p: average if p.dtype == torch.float32 else average.to(p.dtype)
            for p, average in self.averages.items()
        }

    @property
    def trains(self) -> bool:
        """Whether anything that this rank averages can change at all."""
        return any(item.parameter.requires_grad for item in self._items)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Run the student's modules with the teacher's weights, without gradients."""
        students = {p: p.data for p in self._compute}
        try:
            for parameter, teacher in self._compute.items():
                parameter.data = teacher
            with torch.no_grad():
                yield
        finally:
            for parameter, student in students.items():
                parameter.data = student

    @torch.no_grad()
    def update(
        self, masters: Iterable[tuple[torch.nn.Parameter, torch.Tensor]], momentum: float
    ) -> torch.Tensor:
        """Move towards the fp32 `masters` by `1 - momentum`; returns the length of the move over the whole model."""
        squares = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        owned = {item.parameter for item in self._items if item.owned}
        for parameter, master in masters:
            average = self.averages.get(parameter)
            if average is None:
                continue
            if parameter in owned:
                squares += torch.linalg.vector_norm(master - average, dtype=torch.float64).square()
            copy = self._compute[parameter]
            ema_update_(
                average,
                master,
                momentum,
                None if copy is average else copy,
                impl=self._kernels,  # type: ignore[arg-type]
            )
        dist.all_reduce(squares, group=self._topology.mp_group)
        return (1.0 - momentum) * squares.sqrt()

    def refresh_compute_copy(self) -> None:
        """Round the averages anew, after a checkpoint was loaded into them."""
        for parameter, average in self.averages.items():
            if self._compute[parameter] is not average:
                self._compute[parameter].copy_(average)
