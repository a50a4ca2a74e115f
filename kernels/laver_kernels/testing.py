"""Cases, oracles and error budgets: the one source for tests and benchmarks.

A `Problem` holds an operation's inputs, our call, and the plain equation, written without a look at the
implementations (attention's is `mixed_attention/reference.py`, under a mask made from the documents).
The equation runs twice: in fp64 (the oracle) and in the inputs' own dtype (what eager PyTorch
makes of it). Ours may err against the oracle at most twice as much as eager does, output and every gradient.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laver_kernels.ema.api import ema_update_
from laver_kernels.gram.api import gram_loss
from laver_kernels.latent_cross_entropy.api import latent_cross_entropy
from laver_kernels.linear_cross_entropy.api import linear_cross_entropy
from laver_kernels.mixed_attention.api import mixed_attention
from laver_kernels.mixed_attention.reference import attention
from laver_kernels.mixed_attention.rope import rope_table
from laver_kernels.testing_masks import Document, dense_mask, intervals_of, positions_of

# Rounding that no implementation escapes: one output rounding in 16 bits, a short sum's in fp32.
ERROR_FLOOR = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 4e-6, torch.float64: 1e-12}
EAGER_ERRORS_ALLOWED = 2.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operation on one set of inputs; `inputs` are what gradients are taken of."""

    name: str
    inputs: dict[str, Tensor]
    ours: Callable[..., Tensor]  # (inputs..., impl) -> output
    plain: Callable[..., Tensor]  # (inputs...) -> output, in the dtype of the inputs
    has_gradients: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.inputs.values())).dtype

    def upstream(self, output: Tensor) -> Tensor:
        """A fixed gradient to start the backward from."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(output.shape, generator=generator).to(output.device, output.dtype)


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far an output or gradient is from fp64, relative to its norm, and how far it may be."""

    quantity: str
    ours: float
    eager: float
    budget: float

    @property
    def is_ok(self) -> bool:
        return self.ours <= self.budget  # False for NaN


def outputs_and_gradients(
    problem: Problem, function: Callable[..., Tensor], **keywords: Any
) -> dict[str, Tensor]:
    """The output and every input's gradient of one implementation."""
    leaves = {name: x.detach().requires_grad_(problem.has_gradients) for name, x in problem.inputs.items()}
    output = function(*leaves.values(), **keywords)
    found = {"output": output.detach()}
    if problem.has_gradients:
        gradients = torch.autograd.grad(output, list(leaves.values()), problem.upstream(output))
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def measure(problem: Problem, impl: str) -> list[Error]:
    """Errors of an implementation and of eager PyTorch against fp64, for the output and every gradient."""
    ours = outputs_and_gradients(problem, problem.ours, impl=impl)
    eager = outputs_and_gradients(problem, problem.plain)
    exact_inputs = {name: x.double() for name, x in problem.inputs.items()}
    exact = outputs_and_gradients(dataclasses.replace(problem, inputs=exact_inputs), problem.plain)
    errors = []
    for quantity, want in exact.items():
        eager_error = relative_error(eager[quantity], want)
        budget = max(EAGER_ERRORS_ALLOWED * eager_error, ERROR_FLOOR[problem.dtype])
        errors.append(
            Error(
                quantity=quantity,
                ours=relative_error(ours[quantity], want),
                eager=eager_error,
                budget=budget,
            )
        )
    return errors


def check(problem: Problem, impl: str) -> None:
    """Raises AssertionError naming every output or gradient beyond its budget."""
    bad = [error for error in measure(problem, impl) if not error.is_ok]
    text = "; ".join(f"{e.quantity} errs {e.ours:.2e}, budget {e.budget:.2e}" for e in bad)
    assert not bad, f"{problem.name}, {problem.dtype}, {impl}: {text}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64; the absolute error where the oracle is zero."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, want {list(want.shape)}"
    scale = want.norm().item()
    return (got.to(want.dtype) - want).norm().item() / (scale if scale > 0 else 1.0)


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def attention_problem(
    name: str,
    documents: tuple[Document, ...],
    *,
    padding: int = 0,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rotate: bool = True,
) -> Problem:
    """Mixed attention over packed documents, with 2D positions for image tokens."""
    intervals = intervals_of(documents, padding).to(device)
    num_tokens = len(intervals)
    rope = rope_table(positions_of(documents, padding), head_dim, device=device) if rotate else None
    mask_TT = dense_mask(documents, padding).to(device)
    inputs = {
        part: _random((num_tokens, count, head_dim), seed, dtype, device)
        for seed, (part, count) in enumerate((("q", heads[0]), ("k", heads[1]), ("v", heads[1])))
    }
    return Problem(
        name=f"attention {name}",
        inputs=inputs,
        ours=lambda q, k, v, impl: mixed_attention(q, k, v, intervals, rope, impl=impl),
        plain=lambda q, k, v: attention(q, k, v, mask_TT, rope, head_dim**-0.5),
    )


def gram_problem(
    name: str,
    lengths: tuple[int, ...],
    *,
    width: int = 48,
    clip: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """Gram loss of images whose student is somewhat more alike than their teacher."""
    shape = (sum(lengths), width)
    teacher = _random(shape, 0, dtype, device) + 0.3
    return Problem(
        name=f"gram {name}",
        inputs={"student": _random(shape, 1, dtype, device) + 0.6},
        ours=lambda student, impl: gram_loss(
            student, teacher.to(student.dtype), lengths, clip=clip, impl=impl
        ),
        plain=lambda student: plain_gram(student, teacher.to(student.dtype), lengths, clip),
    )


def plain_gram(student_NK: Tensor, teacher_NK: Tensor, lengths: tuple[int, ...], clip: bool) -> Tensor:
    """The Gram loss image by image, in the dtype of its inputs."""
    losses = [student_NK.sum() * 0]
    for student, teacher in zip(student_NK.split(lengths), teacher_NK.split(lengths), strict=True):
        if len(student):
            student, teacher = (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher))
            excess = student @ student.T - teacher @ teacher.T
            excess = excess.clamp(min=0) if clip else excess
            losses.append((excess**2).sum() / len(student) ** 2)
    return torch.stack(losses).sum()


def latent_problem(
    name: str,
    num_rows: int,
    masked: tuple[int, ...],
    *,
    width: int = 40,
    scale: float = 1.0,
    center: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """Latent cross-entropy over some rows; `scale` sets how extreme the logits are."""
    teacher = _random((num_rows, width), 0, dtype, device, scale)
    rows = torch.tensor(masked, dtype=torch.int64, device=device)
    center_K = _random((width,), 2, torch.float32, device) if center else None

    def plain(student: Tensor) -> Tensor:
        shifted = teacher.to(student.dtype) - (0 if center_K is None else center_K.to(student.dtype))
        target = torch.softmax(shifted[rows] / 0.04, -1)
        return -(target * torch.log_softmax(student[rows] / 0.1, -1)).sum()

    return Problem(
        name=f"latent {name}",
        inputs={"student": _random((num_rows, width), 1, dtype, device, scale)},
        ours=lambda student, impl: latent_cross_entropy(student, teacher, rows, center_K=center_K, impl=impl),
        plain=plain,
    )


def head_problem(
    name: str,
    num_rows: int,
    num_columns: int,
    *,
    width: int = 32,
    vocab_size: int | None = None,
    chunk_rows: int = 4096,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """LM head and next-token loss; columns from `vocab_size` on are padding."""
    real = num_columns if vocab_size is None else vocab_size
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, real, (num_rows,), generator=generator).to(device)
    return Problem(
        name=f"head {name}",
        inputs={
            "hidden": _random((num_rows, width), 0, dtype, device),
            "weight": _random((num_columns, width), 1, dtype, device, width**-0.5),
        },
        ours=lambda hidden, weight, impl: linear_cross_entropy(
            hidden, weight, targets, vocab_size=vocab_size, chunk_rows=chunk_rows, impl=impl
        ),
        plain=lambda hidden, weight: torch.nn.functional.cross_entropy(
            (hidden @ weight.T)[:, :real], targets, reduction="sum"
        ),
    )


def ema_problem(
    name: str, num_elements: int, *, source_dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Problem:
    """EMA update at momentum 0.996 of an fp32 average."""
    source = _random((num_elements,), 1, source_dtype, device)

    def ours(average: Tensor, impl: str) -> Tensor:
        average = average.clone()
        ema_update_(average, source, 0.996, impl=impl)  # type: ignore[arg-type]
        return average

    return Problem(
        name=f"ema {name}",
        inputs={"average": _random((num_elements,), 0, torch.float32, device)},
        ours=ours,
        plain=lambda average: average + 0.004 * (source.to(average.dtype) - average),
        has_gradients=False,
    )
