"""The mixed-attention mask as one interval per row and one per column: 16 bytes a token, no [T, T]."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laver_kernels.checks import can_read, want_tensor
from laver_kernels.mixed_attention.spans import Spans, as_spans, bounds_of_spans, check_within


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Row `i` sees keys `[row_lo[i], row_hi[i])`; column `j` is seen by rows `[col_lo[j], col_hi[j])`.

    All four are int32 on one device, `[T]` where queries and keys are the same tokens; with a KV cache there are fewer
    rows than columns. Among rows that see anything, lows and highs never decrease.
    A row with `lo >= hi` is empty: its output and its gradients are zero (padding).
    `blocks` are optional document boundaries as Python integers, `(0, end of first, ..., T)`: no row sees
    past its block. Only the reference uses them, to skip what no row sees; it finds them where they are None.

    Raises:
        ValueError: wrong dtype, shape or device; for CPU tensors also unordered or contradictory intervals,
            when the mask is first used.
    """

    row_lo_T: Tensor
    row_hi_T: Tensor
    col_lo_T: Tensor
    col_hi_T: Tensor
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        device = self.row_lo_T.device
        num_tokens = self.row_lo_T.shape[0] if self.row_lo_T.dim() else 0
        num_keys = self.col_lo_T.shape[0] if self.col_lo_T.dim() else 0
        sizes = {"row_lo_T": num_tokens, "row_hi_T": num_tokens, "col_lo_T": num_keys, "col_hi_T": num_keys}
        for name, size in sizes.items():
            want_tensor("Intervals", name, getattr(self, name), (size,), (torch.int32,), device)
        if self.blocks is not None:
            if num_keys != num_tokens:
                raise ValueError(
                    f"Intervals: blocks with {num_tokens} rows and {num_keys} columns, want a square"
                )
            bounds = self.blocks
            ordered = all(a < b for a, b in itertools.pairwise(bounds))
            if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != num_tokens or not ordered:
                raise ValueError(
                    f"Intervals: blocks={bounds}, want increasing boundaries from 0 to T={num_tokens}"
                )

    def __len__(self) -> int:
        return self.row_lo_T.shape[0]

    @property
    def num_keys(self) -> int:
        """Columns; `len` are the rows."""
        return self.col_lo_T.shape[0]

    @property
    def device(self) -> torch.device:
        return self.row_lo_T.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Intervals":
        """The same mask on another device."""
        if torch.device(device) == self.device:
            return self
        moved = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.row_lo_T, self.row_hi_T, self.col_lo_T, self.col_hi_T)
        )
        row_lo_T, row_hi_T, col_lo_T, col_hi_T = moved
        return Intervals(
            row_lo_T=row_lo_T, row_hi_T=row_hi_T, col_lo_T=col_lo_T, col_hi_T=col_hi_T, blocks=self.blocks
        )

    @classmethod
    def from_rows(
        cls,
        row_lo_T: Tensor,
        row_hi_T: Tensor,
        blocks: tuple[int, ...] | None = None,
        num_keys: int | None = None,
    ) -> "Intervals":
        """Derives the column intervals from ordered row intervals, both int32 `[T]` (empty rows included).

        `num_keys` are the columns, by default as many as rows.
        """
        col_lo_T, col_hi_T = _columns(row_lo_T, row_hi_T, len(row_lo_T) if num_keys is None else num_keys)
        return cls(row_lo_T=row_lo_T, row_hi_T=row_hi_T, col_lo_T=col_lo_T, col_hi_T=col_hi_T, blocks=blocks)

    def part(self, rows: tuple[int, int], keys: tuple[int, int]) -> "Intervals":
        """What rows [first, last) see of keys [first, last), counted from there: new tokens before a KV cache, or
        one block of ring attention. Waits for nothing.
        """
        row, key = slice(*rows), slice(*keys)
        num_rows, num_keys = rows[1] - rows[0], keys[1] - keys[0]
        return Intervals(
            row_lo_T=(self.row_lo_T[row] - keys[0]).clamp(0, num_keys),
            row_hi_T=(self.row_hi_T[row] - keys[0]).clamp(0, num_keys),
            col_lo_T=(self.col_lo_T[key] - rows[0]).clamp(0, num_rows),
            col_hi_T=(self.col_hi_T[key] - rows[0]).clamp(0, num_rows),
        )

    @classmethod
    def cat(cls, masks: Sequence["Intervals"]) -> "Intervals":
        """Sequences after one another, none of which sees another: a batch as one packed sequence."""
        num_rows = list(itertools.accumulate((len(mask) for mask in masks), initial=0))
        num_keys = list(itertools.accumulate((mask.num_keys for mask in masks), initial=0))

        def joined(name: str, offsets: list[int]) -> Tensor:
            return torch.cat([getattr(mask, name) + by for mask, by in zip(masks, offsets[:-1], strict=True)])

        return cls(
            row_lo_T=joined("row_lo_T", num_keys),
            row_hi_T=joined("row_hi_T", num_keys),
            col_lo_T=joined("col_lo_T", num_rows),
            col_hi_T=joined("col_hi_T", num_rows),
        )

    def repeated(self, count: int) -> "Intervals":
        """`count` sequences with this mask each; remembered, since every layer asks."""
        if count == 1:
            return self
        known = self.__dict__.setdefault("_repeated", {})
        if count not in known:
            known[count] = Intervals.cat([self] * count)
        return known[count]

    @classmethod
    def from_spans(
        cls,
        documents: Spans,
        images: Spans = (),
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "Intervals":
        """The mask of packed documents: text is causal, the tokens of an image see each other both ways.

        `documents` and `images` are `[n, 2]` pairs (first token, one past the last), in order; tokens of no document
        are padding. `num_tokens` defaults to the end of the last document; for spans on a GPU that waits for it.

        Raises:
            ValueError: spans out of order or overlapping, beyond `num_tokens`, or an image in no document.
        """
        documents_N2 = as_spans("documents", documents, device)
        images_M2 = as_spans("images", images, documents_N2.device)
        if num_tokens is None:
            num_tokens = int(documents_N2[-1, 1]) if len(documents_N2) else 0
        check_within(documents_N2, images_M2, num_tokens)
        row_lo_T, row_hi_T, col_lo_T, col_hi_T = bounds_of_spans(documents_N2, images_M2, num_tokens)
        return cls(row_lo_T=row_lo_T, row_hi_T=row_hi_T, col_lo_T=col_lo_T, col_hi_T=col_hi_T)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, images: Spans = (), num_tokens: int | None = None
    ) -> "Intervals":
        """The same from cumulative document lengths `[0, end of first, ...]`, as variable-length attention takes them.

        Raises:
            ValueError: lengths that fall, do not start at 0, or exceed `num_tokens`; an image in no document.
        """
        want_tensor("Intervals", "cu_seqlens", cu_seqlens, ("N + 1",), (torch.int32, torch.int64))
        if len(cu_seqlens) == 0 or (can_read(cu_seqlens) and int(cu_seqlens[0]) != 0):
            raise ValueError(f"Intervals: cu_seqlens={cu_seqlens.tolist()}, want it to start with 0")
        return cls.from_spans(torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], dim=1), images, num_tokens)

    def validate(self) -> None:
        """Checks order and that rows and columns describe the same mask; free of cost but on the first call.

        Values on a GPU are not looked at: that would wait for the device.
        """
        if can_read(self.row_lo_T):
            _ = self._is_consistent

    @functools.cached_property
    def _is_consistent(self) -> bool:
        lo_T, hi_T = self.row_lo_T, self.row_hi_T
        seen = (lo_T < hi_T).nonzero().flatten()
        lo, hi = lo_T[seen], hi_T[seen]
        if len(seen) and (int(lo.min()) < 0 or int(hi.max()) > self.num_keys):
            raise ValueError(
                f"Intervals: rows reach [{int(lo.min())}, {int(hi.max())}), want within [0, {self.num_keys})"
            )
        for name, bound in (("row_lo_T", lo), ("row_hi_T", hi)):
            falls = (bound[1:] < bound[:-1]).nonzero().flatten()
            if len(falls):
                at = int(falls[0])
                raise ValueError(
                    f"Intervals: {name} falls from {int(bound[at])} at row {int(seen[at])} to "
                    f"{int(bound[at + 1])} at row {int(seen[at + 1])}, want ordered intervals"
                )
        self._check_columns()
        if self.blocks is not None:
            self._check_blocks(seen, lo, hi)
        return True

    def _check_columns(self) -> None:
        want_lo, want_hi = _columns(self.row_lo_T, self.row_hi_T, self.num_keys)
        # Compared as ranges over the rows that see anything: empty rows inside an interval change nothing.
        rank = torch.zeros(len(self) + 1, dtype=torch.int64)
        rank[1:] = (self.row_lo_T < self.row_hi_T).cumsum(0)
        got_first, got_last = rank[self.col_lo_T.clamp(0, len(self))], rank[self.col_hi_T.clamp(0, len(self))]
        want_first, want_last = rank[want_lo], rank[want_hi]
        both_empty = (got_first >= got_last) & (want_first >= want_last)
        same = both_empty | ((got_first == want_first) & (got_last == want_last))
        wrong = (~same).nonzero().flatten()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"Intervals: column {at} says [{int(self.col_lo_T[at])}, {int(self.col_hi_T[at])}), "
                f"the row intervals say [{int(want_lo[at])}, {int(want_hi[at])})"
            )

    def _check_blocks(self, seen: Tensor, lo: Tensor, hi: Tensor) -> None:
        bounds = torch.tensor(self.blocks, dtype=torch.int64)
        block = torch.searchsorted(bounds, seen, right=True) - 1
        outside = ((lo < bounds[block]) | (hi > bounds[block + 1])).nonzero().flatten()
        if len(outside):
            at = int(outside[0])
            raise ValueError(
                f"Intervals: row {int(seen[at])} sees [{int(lo[at])}, {int(hi[at])}), outside its block "
                f"[{int(bounds[block[at]])}, {int(bounds[block[at] + 1])})"
            )


def _columns(row_lo_T: Tensor, row_hi_T: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Column `j` is seen from the first row whose `hi` exceeds `j` up to the first row whose `lo` does."""
    num_tokens = len(row_lo_T)
    seen = (row_lo_T < row_hi_T).nonzero().flatten()
    column = torch.arange(num_keys, dtype=torch.int32, device=row_lo_T.device)
    first = torch.searchsorted(row_hi_T[seen].contiguous(), column, right=True)
    last = torch.searchsorted(row_lo_T[seen].contiguous(), column, right=True)
    # Back from the k-th row that sees anything to its place in the sequence; an empty interval stays empty.
    place = torch.cat([seen, seen.new_full((1,), num_tokens)])
    end = torch.cat([seen.new_zeros(1), seen + 1])
    is_seen = first < last
    col_lo = torch.where(is_seen, place[first], 0)
    col_hi = torch.where(is_seen, end[last], 0)
    return col_lo.int(), col_hi.int()
