"""LoRA (arXiv 2106.09685) on Megatron's linear layers: W x + (alpha / r) B A x, with W frozen.

Queries, keys and values lie in one matrix here, and so do SwiGLU's gate and up projection, but each of them has an
adapter of its own, as in transformers, or none: `lora_a` [n r, in] holds their A's one above the other, and `lora_b`
[out, r] their B's, row by row as their rows lie in the matrix itself. So B is cut, fused and converted as the matrix
is, and an adapter directory of `peft` is the same numbers.

Tensor parallelism: a column-parallel layer has A whole and its rows of B; a row-parallel one its columns of A and B
whole. What is exchanged has r channels, never the width of the layer.

Shapes: s rows of this rank, r rank, n adapted projections of one matrix, G key groups of this rank (1 for the MLP).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from laver_mcore.config.architecture import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter of one kind of layer."""

    layer: str
    """One of `config.architecture.PROJECTIONS`."""
    projections: tuple[int, ...]
    """Which of the projections in its matrix have adapters."""
    parts: tuple[int, ...]
    """How the rows of the matrix, or of a key group, divide among all of its projections."""
    rank: int
    scale: float
    dropout: float

    @classmethod
    def of(cls, model: ModelConfig, layer: str) -> "Lora":
        """The recipe's, for layers called `layer`."""
        return cls(
            layer=layer,
            projections=model.adapted_layers[layer],
            parts=model.projection_parts(layer),
            rank=model.lora_rank,
            scale=model.lora_alpha / model.lora_rank,
            dropout=model.lora_dropout,
        )


class _Adapted:
    """A Megatron linear layer with an adapter beside it."""

    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter

    def __init__(self, *args: Any, lora: Lora, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lora = lora
        self.drops = True
        """Off while the teacher computes."""

    def _add(self, name: str, shape: tuple[int, int], *, cut: int | None, shared: bool) -> None:
        """A parameter that tensor parallelism cuts along `cut`; `shared`: whole, but seen by a share of the rows."""
        config = self.config  # type: ignore[attr-defined]
        parameter = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        if cut is not None:
            set_tensor_model_parallel_attributes(parameter, True, cut, 1)
        elif shared:
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        setattr(self, name, parameter)

    def _down(self, x: torch.Tensor, same_on_all_ranks: bool) -> torch.Tensor:
        """A x, behind dropout of x: [s, 1, in] -> [s, 1, n r]."""
        lora = self._lora
        if lora.dropout and self.training and self.drops:  # type: ignore[attr-defined]
            stream = contextlib.nullcontext() if same_on_all_ranks else get_cuda_rng_tracker().fork()
            with stream:
                x = F.dropout(x, lora.dropout)
        return F.linear(x, self.lora_a)

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return output + self._lora.scale * self._delta(input_), bias

    def _delta(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _sharded(
        self, axes: dict[str, int], prefix: str, offsets: tuple, metadata: dict | None
    ) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)  # type: ignore[attr-defined]
        groups = dict(tp_group=self.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"])  # type: ignore[attr-defined]
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets, **groups)


class LoraColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Queries, keys and values, or gate and up projection."""

    def __init__(self, *args: Any, lora: Lora, **kwargs: Any) -> None:
        super().__init__(*args, lora=lora, **kwargs)
        unit = self.output_size_per_partition // sum(lora.parts)
        rows = unit * sum(lora.parts[i] for i in lora.projections)
        self._groups = unit // self.config.kv_channels if lora.layer == "linear_qkv" else 1
        self._unit = unit // self._groups
        self._add("lora_a", (len(lora.projections) * lora.rank, self.input_size), cut=None, shared=True)
        self._add("lora_b", (rows, lora.rank), cut=0, shared=False)

    def _delta(self, x: torch.Tensor) -> torch.Tensor:
        sharing = self.config.sequence_parallel
        down = self._down(x, same_on_all_ranks=not sharing)
        if sharing:
            down = gather_from_sequence_parallel_region(down, group=self.tp_group)
        else:
            down = copy_to_tensor_model_parallel_region(down, group=self.tp_group)
        rows = [self._unit * part for part in self._lora.parts]
        adapted = self._lora.projections
        weights = self.lora_b.unflatten(0, (self._groups, -1)).split([rows[i] for i in adapted], dim=1)
        found = {  # [s, 1, G, rows of a group] each
            i: F.linear(a, b.flatten(0, 1)).unflatten(-1, (self._groups, -1))
            for i, a, b in zip(adapted, down.split(self._lora.rank, dim=-1), weights, strict=True)
        }
        none = (*down.shape[:-1], self._groups)
        out = [found[i] if i in found else down.new_zeros(*none, n) for i, n in enumerate(rows)]
        return torch.cat(out, dim=-1).flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As Megatron's, with the rows of B cut like those of the matrix."""
        found = self._sharded({"weight": 0, "bias": 0, "lora_b": 0}, prefix, sharded_offsets, metadata)
        if self._lora.layer == "linear_fc1" and len(self._lora.projections) == 2:
            key = f"{prefix}lora_b"  # every rank holds its part of the gate above its part of the other
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


class LoraRowParallelLinear(_Adapted, RowParallelLinear):
    """Output projections of attention and of the MLP."""

    def __init__(self, *args: Any, lora: Lora, **kwargs: Any) -> None:
        super().__init__(*args, lora=lora, **kwargs)
        self._add("lora_a", (lora.rank, self.input_size_per_partition), cut=1, shared=False)
        self._add("lora_b", (self.output_size, lora.rank), cut=None, shared=True)

    def _delta(self, x: torch.Tensor) -> torch.Tensor:
        down = self._down(x, same_on_all_ranks=False)
        if self.config.sequence_parallel:
            down = reduce_scatter_to_sequence_parallel_region(down, group=self.tp_group)
        else:
            down = reduce_from_tensor_model_parallel_region(down, group=self.tp_group)
        return F.linear(down, self.lora_b)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As Megatron's, with the columns of A cut like those of the matrix."""
        return self._sharded({"weight": 1, "lora_a": 1}, prefix, sharded_offsets, metadata)


@contextlib.contextmanager
def without_dropout(module: torch.nn.Module) -> Iterator[None]:
    """The adapters of `module` see all of their inputs."""
    adapted = [layer for layer in module.modules() if isinstance(layer, _Adapted)]
    for layer in adapted:
        layer.drops = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.drops = True
