"""What the kernels are timed against, each where its library is installed."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Builder = Callable[[], Callable[..., Tensor]]
"""Makes a baseline when its turn comes: building one may compile, allocate, or fail."""

GEMMS_ALONE = "gemms alone"


class LeftOut(Exception):
    """A baseline that is not run here, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A baseline whose inputs are made ready outside the timing: what a user would do once is not counted."""

    prepare: Callable[..., dict[str, Tensor]]
    function: Callable[..., Tensor]

    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.function(**self.prepare(**inputs))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes at hand."""
    return torch.compile(function, dynamic=False)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False


def where_installed(module: str, builder: Callable[[], Callable[..., Tensor]]) -> Builder:
    """The baseline of an optional library, named even where the library is not."""

    def build() -> Callable[..., Tensor]:
        if not _is_installed(module):
            raise LeftOut(f"{module} is not installed")
        return builder()

    return build


MOST_COMPILED_SIZES = 8  # every further image size is a part of the graph of its own: minutes of compilation


def gram(teacher: Tensor, lengths: tuple[int, ...]) -> dict[str, Builder]:
    """The clipped Gram loss in bf16, images of one size as one batch: what eager PyTorch does at its best."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]

    def plain(student: Tensor) -> Tensor:
        losses = []
        start = 0
        for length, count in runs:
            rows = slice(start, start + length * count)
            student_BNK, teacher_BNK = (
                F.normalize(z[rows].view(count, length, -1), dim=-1) for z in (student, teacher)
            )
            excess_BNN = (student_BNK @ student_BNK.mT - teacher_BNK @ teacher_BNK.mT).clamp(min=0)
            losses.append(excess_BNN.square().sum(dtype=torch.float32) / length**2)
            start = rows.stop
        return torch.stack(losses).sum()

    def build_compiled() -> Callable[..., Tensor]:
        if len(runs) > MOST_COMPILED_SIZES:
            raise LeftOut(f"{len(runs)} image sizes would compile for minutes")
        return compiled(plain)

    def products() -> Callable[..., Tensor]:
        return lambda student: _GramProducts.apply(student, teacher, runs)

    return {"eager bf16": lambda: plain, "compiled": build_compiled, GEMMS_ALONE: products}


class _GramProducts(torch.autograd.Function):
    """The matrix products of the Gram loss and of its gradient without a loss between: not a result, a floor."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        grams, start = [], 0
        for length, count in runs:
            rows = slice(start, start + length * count)
            student_BNK, teacher_BNK = (z[rows].view(count, length, -1) for z in (student, teacher))
            grams.append(student_BNK @ student_BNK.mT)
            last = teacher_BNK @ teacher_BNK.mT
            start = rows.stop
        ctx.save_for_backward(student, *grams)
        ctx.runs = runs
        return last[0, 0, 0].float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        student, *grams = ctx.saved_tensors
        out, start = torch.empty_like(student), 0
        for gram, (length, count) in zip(grams, ctx.runs, strict=True):
            rows = slice(start, start + length * count)
            torch.matmul(gram, student[rows].view(count, length, -1), out=out[rows].view(count, length, -1))
            start = rows.stop
        return out, None, None


def head(targets: Tensor) -> dict[str, Builder]:
    """Logits of all rows, eager and compiled, fused losses where installed, and the bare matrix products."""

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    return {
        "eager": lambda: plain,
        "compiled": lambda: compiled(plain),
        # By position: up to torch 2.11 `apply` takes no keywords.
        GEMMS_ALONE: lambda: lambda hidden, weight: _ThreeProducts.apply(hidden, weight),
        "liger": where_installed("liger_kernel", lambda: _liger(targets)),
        "cut cross-entropy": where_installed("cut_cross_entropy", lambda: _cut_cross_entropy(targets)),
    }


def _liger(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight: loss(weight, hidden, targets)


def _cut_cross_entropy(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, reduction="sum")


class _ThreeProducts(torch.autograd.Function):
    """Logits, and both gradients' products, without a loss between: not a result, a floor."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden
