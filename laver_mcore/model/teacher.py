"""The EMA teacher: an fp32 average of the decoder and the vision head, by name, on the optimizer's own shards.

There is no second module tree. The teacher's forward runs the student's modules with the teacher's weights swapped
in; it shares the vision encoder and the connector, which have no average (LaVer, arXiv 2512.06281, section 3.2), and
frozen weights, whose average is themselves.

A rank keeps the fp32 average of exactly those elements whose fp32 master it keeps (4 bytes per parameter / DP under
the distributed optimizer) and moves it without communication. Only the compute copy, in the model's precision, is
whole on every rank; it is gathered when the teacher moves. The average must be fp32: over 1,000 steps at momentum
0.996 it covers 98.2 % of the way to a fixed student, in bfloat16 1.3 % at best.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from laver_kernels import ema_update_
from laver_mcore.megatron.parallel import Topology
from laver_mcore.megatron.weight_shards import Bucket, Range, gather_shards, move_pieces
from laver_mcore.model.parameters import named_parameters
from laver_mcore.model.vision_language import VisionLanguageModel

MasterShard = Callable[[torch.nn.Parameter, int, int], torch.Tensor]
"""(parameter, start, stop) -> these elements of its flattened fp32 master, which this rank keeps."""


class TeacherError(RuntimeError):
    """The teacher did not move although it should have."""


class Teacher:
    """EMA of the student's fp32 weights, of the parameters whose names begin with one of `averaged`.

    `buckets` say how the trainable parameters are cut; `averages` maps a parameter to the flat fp32 average of the
    elements kept here. With `offload` the averages live in host memory and visit the device only to move.
    """

    def __init__(
        self,
        chunks: list[VisionLanguageModel],
        topology: Topology,
        buckets: Sequence[Bucket],
        kernels: str = "auto",
        *,
        averaged: tuple[str, ...],
        offload: bool = False,
    ) -> None:
        self._topology, self._kernels = topology, kernels
        self._fp8 = [chunk.fp8 for chunk in chunks if chunk.fp8 is not None]
        items = [item for item in named_parameters(chunks, topology) if item.name.startswith(averaged)]
        mine = {item.parameter for item in items}
        self._owned = {item.parameter for item in items if item.owned}
        self._frozen = [item.parameter for item in items if not item.parameter.requires_grad]
        self._members = [(b, [p for p in b.places if p in mine]) for b in buckets]
        self._cut = {p: b for b, members in self._members if b.num_shards > 1 for p in members}
        self._held: dict[torch.nn.Parameter, Range] = {
            p: bucket.held(p) for bucket, members in self._members for p in members
        }
        self.averages: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._compute: dict[torch.nn.Parameter, torch.Tensor] = {}
        for parameter, (start, stop) in self._held.items():
            if start < stop:
                average = parameter.detach().view(-1)[start:stop].float().clone()
                self.averages[parameter] = _to_host(average) if offload else average
            # A whole average in the model's own precision computes itself; otherwise a rounded or whole copy does.
            whole = not offload and stop - start == parameter.numel() and parameter.dtype == torch.float32
            self._compute[parameter] = (
                self.averages[parameter].view_as(parameter) if whole else parameter.detach().clone()
            )

    @property
    def trains(self) -> bool:
        """Whether anything that this rank averages can change at all."""
        return bool(self._compute)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that have an average which may differ from themselves."""
        return list(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes of averages, compute copies and fp8 codes on this rank, each storage counted once."""
        storages = {
            t.untyped_storage().data_ptr(): t.nbytes
            for t in (*self.averages.values(), *self._compute.values())
        }
        return sum(storages.values()) + sum(fp8.num_bytes for fp8 in self._fp8)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Run the student's modules with the teacher's weights, without gradients."""
        students = {p: p.data for p in self._compute}
        try:
            for parameter, teacher in self._compute.items():
                parameter.data = teacher
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for fp8 in self._fp8:
                    stack.enter_context(fp8.run())
                yield
        finally:
            for parameter, student in students.items():
                parameter.data = student

    @torch.no_grad()
    def update(self, master_shard: MasterShard, momentum: float | torch.Tensor) -> torch.Tensor:
        """Move towards the fp32 masters by `1 - momentum`; returns the length of the move over the whole model.

        `momentum` may be a scalar tensor on the device, for a host that does not wait for it.
        Source: LaVer (arXiv 2512.06281), section 3.2. All ranks take part.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        for parameter, average in self.averages.items():
            start, stop = self._held[parameter]
            master = master_shard(parameter, start, stop)
            moving = average.to(master.device, non_blocking=True)  # itself, unless it is offloaded
            if parameter in self._owned:
                squares += torch.linalg.vector_norm(master - moving, dtype=torch.float64).square()
            copy = self._compute[parameter].view(-1)[start:stop]
            ema_update_(
                moving,
                master,
                momentum,
                None if copy.data_ptr() == moving.data_ptr() else copy,
                impl=self._kernels,  # type: ignore[arg-type]
            )
            if moving is not average:
                average.copy_(moving, non_blocking=True)
        self._gather_compute_copies()
        self._forget_codes()
        # First over the shards: a stage on which nothing trains has none, and adds zero over the model's ranks.
        for group in {bucket.group for bucket, _ in self._members if bucket.group is not None}:
            dist.all_reduce(squares, group=group)
        dist.all_reduce(squares, group=self._topology.mp_group)
        return (1.0 - momentum) * squares.sqrt()

    def _forget_codes(self) -> None:
        for fp8 in self._fp8:
            fp8.forget()

    def _gather_compute_copies(self) -> None:
        for bucket, members in self._members:
            if bucket.num_shards == 1 or not members:
                continue
            wholes = {p: self._compute[p].view(-1) for p in members}
            shards = {p: wholes[p][slice(*self._held[p])] for p in members if p in self.averages}
            gather_shards(bucket, shards, wholes, dtype=members[0].dtype, device=members[0].device)

    @torch.no_grad()
    def whole_averages(
        self, wanted: Collection[torch.nn.Parameter]
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The fp32 averages of this model shard in host memory, whole and shaped, of those `wanted` on this rank.

        All ranks take part, whatever each of them wants. A frozen parameter is its own average. Averages that are whole
        in host memory already are given as they are, not copied.
        """
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # offloaded averages may be on their way to the host
        wholes = {p: p.detach().float().cpu() for p in self._frozen if p in wanted}
        for bucket, members in self._members:
            if bucket.num_shards == 1:
                flat = {p: self.averages[p].cpu() if p in wanted else None for p in members}
            else:
                flat = {p: torch.empty(p.numel()) if p in wanted else None for p in members}
                gather_shards(bucket, self.averages, flat, dtype=torch.float32, device=self._topology.device)
            wholes |= {p: whole.view(p.shape) for p, whole in flat.items() if whole is not None}
        return wholes

    def keeps(self, parameter: torch.nn.Parameter) -> bool | None:
        """Whether it is this rank that saves and loads a parameter's average; None where every rank has it whole."""
        bucket = self._cut.get(parameter)
        return None if bucket is None else bucket.keeps(parameter)

    @torch.no_grad()
    def load(self, wholes: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Take over whole fp32 averages, of each parameter on the rank that `keeps` it or, None, on all.

        Frozen parameters are passed over. All ranks take part.
        """
        for bucket, members in self._members:
            for parameter in members:
                whole, average = wholes.get(parameter), self.averages.get(parameter)
                flat = None if whole is None else whole.view(-1)
                move_pieces(bucket, parameter, average, flat, gather=False, device=self._topology.device)
                if average is not None:
                    copy = self._compute[parameter].view(-1)
                    copy[slice(*self._held[parameter])].copy_(average)
        self._gather_compute_copies()
        self._forget_codes()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where there is a GPU to copy to."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)
