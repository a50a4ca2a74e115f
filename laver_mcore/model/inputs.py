"""What one forward pass needs, on the device: built once per micro-batch from its `Batch`.

Shapes: T dialogue tokens, N visual tokens, R image rows (N and padding), S = T + R rows. The teacher sees the image
rows alone: they have the student's own positions and mask.
"""

from dataclasses import dataclass, replace

import torch

from laver_kernels import Intervals, rope_table
from laver_kernels.mixed_attention.rope import Split
from laver_mcore.data.order.balance import image_shares
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.data.sequence.layout import SequenceLayout, concatenate, reconstruction_layout
from laver_mcore.device import send
from laver_mcore.model.mixed_attention import PackedLayout

_BOUNDS = ("row_lo_T", "row_hi_T", "col_lo_T", "col_hi_T")
"""Tensors of `Intervals`."""


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One pass over [dialogue | image rows]; either part may be empty.

    On ranks that do not encode images `pixels` is None. `share_grids` are the token grids of the images that each
    rank of the first stage (tensor x context parallel) encodes, in image order.
    """

    packed: PackedLayout
    teacher_packed: PackedLayout | None
    num_rows: int
    num_dialogue: int
    num_visual: int
    tokens_T: torch.Tensor
    visual_rows_N: torch.Tensor
    pixels: torch.Tensor | None
    features: torch.Tensor | None
    share_grids: tuple[tuple[tuple[int, int], ...], ...]
    reconstruct: bool
    """Whether there are image rows, if only of padding."""
    travelling: tuple[int, ...] = ()
    """Rows of each group that travels to the last stage, padding included."""

    @property
    def travelling_rows(self) -> int:
        """Rows of one such group."""
        return self.travelling[0] if self.travelling else 0

    @property
    def num_reconstruction(self) -> int:
        """Image rows, padding included: what the teacher sees."""
        return self.num_rows - self.num_dialogue if self.reconstruct else 0

    @property
    def share_counts(self) -> tuple[int, ...]:
        """Visual tokens that each rank of the first stage contributes."""
        return tuple(sum(h * w for h, w in grids) for grids in self.share_grids)


@dataclass(frozen=True, kw_only=True)
class AttentionGeometry:
    """How a layout becomes positions and a mask: constants of the model."""

    head_dim: int
    rotary_base: float
    mrope_section: tuple[int, int, int]
    rope_scaling: tuple[float, float, float, int] | None = None
    mrope_split: Split = "contiguous"
    rope_2d: bool = True
    mixed: bool = True


def _packed(
    layouts: list[SequenceLayout], num_rows: int, geometry: AttentionGeometry, device: torch.device
) -> PackedLayout:
    layout = concatenate(layouts, num_rows)
    positions_3S = layout.positions_3S if geometry.rope_2d else _one_dimensional(layout)
    rope = rope_table(
        send(positions_3S, device),
        geometry.head_dim,
        geometry.rotary_base,
        geometry.mrope_section,
        scaling=geometry.rope_scaling,
        split=geometry.mrope_split,
    )
    intervals = layout.intervals if geometry.mixed else _causal(layout.intervals)
    return PackedLayout(intervals=intervals, rope=rope)


def _after(packed: PackedLayout, start: int) -> PackedLayout:
    """The rows from `start` on, a document boundary, as a layout of their own; shares the rotary table."""
    assert packed.intervals is not None
    assert packed.rope is not None
    moved = {
        # Bounds of an empty row may lie before `start`; they mean nothing, but are not to be negative.
        name: (getattr(packed.intervals, name)[start:] - start).clamp(min=0)
        for name in _BOUNDS
    }
    blocks = packed.intervals.blocks
    if blocks is not None:
        blocks = tuple(bound - start for bound in blocks if bound >= start)
    cos_TF, sin_TF = packed.rope
    return PackedLayout(intervals=Intervals(**moved, blocks=blocks), rope=(cos_TF[start:], sin_TF[start:]))


def _to(packed: PackedLayout, device: torch.device) -> PackedLayout:
    assert packed.intervals is not None
    if packed.intervals.device == device:
        return packed
    moved = {name: send(getattr(packed.intervals, name), device) for name in _BOUNDS}
    return replace(packed, intervals=Intervals(**moved, blocks=packed.intervals.blocks))


def _one_dimensional(layout: SequenceLayout) -> torch.Tensor:
    """Ordinary positions: each row counts from its document's start, on all three axes alike."""
    rows = torch.arange(len(layout.intervals))
    return (rows - layout.intervals.row_lo_T).clamp(min=0).expand(3, -1).contiguous()


def _causal(intervals: Intervals) -> Intervals:
    """The same documents with every row seeing itself and what precedes it only."""
    rows = torch.arange(len(intervals), dtype=torch.int32)
    return replace(
        intervals,
        row_hi_T=torch.minimum(intervals.row_hi_T, rows + 1),
        col_lo_T=torch.maximum(intervals.col_lo_T, rows),
    )


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def share_grids(batch: Batch, num_shares: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Token grids of the images that each rank of the first stage encodes."""
    return tuple(batch.image_grids[start:stop] for start, stop in image_shares(batch.image_grids, num_shares))


def num_student_rows(batch: Batch, reconstruct: bool, pad_to_multiple: int) -> int:
    """Rows of the student's pass over one micro-batch: the dialogue, and the padded image rows."""
    visual = len(batch.visual_rows_N) if reconstruct else 0
    return len(batch.tokens_T) + round_up(visual, pad_to_multiple)


def model_inputs(
    batch: Batch,
    num_rows: int,
    *,
    reconstruct: bool = False,
    travelling: tuple[int, ...] = (),
    geometry: AttentionGeometry,
    num_shares: int,
    device: torch.device,
    features: torch.Tensor | None = None,
) -> ModelInputs:
    """Inputs of one pass: the dialogue, and behind it the images once more where they are to be `reconstruct`ed."""
    num_visual, num_dialogue = len(batch.visual_rows_N), len(batch.tokens_T)
    layouts = [batch.layout]
    if reconstruct and num_visual:
        layouts.append(reconstruction_layout(batch.image_grids))
    packed = _packed(layouts, num_rows, geometry, device)
    return ModelInputs(
        packed=_to(packed, device),
        teacher_packed=_to(_after(packed, num_dialogue), device) if num_rows > num_dialogue else None,
        num_rows=num_rows,
        num_dialogue=num_dialogue,
        num_visual=num_visual,
        tokens_T=send(batch.tokens_T, device),
        visual_rows_N=send(batch.visual_rows_N, device),
        pixels=None if batch.pixels is None else send(batch.pixels, device),
        features=features,
        share_grids=share_grids(batch, num_shares),
        reconstruct=reconstruct,
        travelling=travelling,
    )
