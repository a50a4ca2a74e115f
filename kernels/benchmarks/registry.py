"""What is timed: every operation with its shapes, useful work, baselines, and the problem that guards it."""

import itertools
from collections.abc import Callable, Iterator

import attention_baselines
import baselines
import torch
from torch import Tensor
from workload import BF16, Benchmark, Inputs, Work, Workload, random_tensor

from laver_kernels import (
    ema_update_,
    gram_loss,
    latent_cross_entropy,
    linear_cross_entropy,
    mixed_attention,
    rope_table,
)
from laver_kernels.testing import (
    Problem,
    attention_problem,
    ema_problem,
    gram_problem,
    head_problem,
    latent_problem,
)
from laver_kernels.testing_masks import (
    Document,
    image,
    intervals_of,
    many_image_documents,
    one_image_documents,
    positions_of,
    text,
)

MIXES: dict[str, Callable[[int], tuple[Document, ...]]] = {
    "one image": one_image_documents,
    "five images": many_image_documents,
    "causal": lambda num_tokens: ((text(num_tokens),),),
    "reconstruction": lambda num_tokens: ((image(729),),) * (num_tokens // 729),
    "full": lambda num_tokens: ((image(num_tokens),),),
}
SMALL_MIXES: dict[str, tuple[Document, ...]] = {
    "one image": ((text(3), image(20), text(30)),),
    "five images": ((text(4), image(9), text(4), image(9), text(4)),) * 2,
    "causal": ((text(50),),),
    "reconstruction": ((image(16),),) * 3,
    "full": ((image(45),),),
}
HEADS = {1: (28, 4), 2: (14, 2), 4: (7, 1)}  # tensor-parallel size -> query and key heads of Qwen2.5-7B
TOKENS = (4096, 8192, 16384, 32768)
QUICK_ATTENTION = {
    ("one image", 1, 8192),
    ("one image", 4, 32768),
    ("five images", 1, 8192),
    ("five images", 4, 32768),
    ("causal", 1, 8192),
    ("reconstruction", 1, 8192),
    ("full", 1, 8192),
}


def attention_workload(
    documents: tuple[Document, ...], heads: tuple[int, int], head_dim: int, rotate: bool, device: str = "cuda"
) -> Workload:
    intervals = intervals_of(documents).to(device)
    num_tokens = len(intervals)
    pairs = int((intervals.row_hi_T - intervals.row_lo_T).clamp(min=0).sum())
    rope = rope_table(positions_of(documents), head_dim, device=device) if rotate else None
    counts = {"q": heads[0], "k": heads[1], "v": heads[1]}

    def make_inputs(seed: int) -> Inputs:
        return {
            name: random_tensor((num_tokens, count, head_dim), 10 * seed + place, device)
            for place, (name, count) in enumerate(counts.items())
        }

    others, extra = attention_baselines.attention(intervals, documents, rope)
    product = 2.0 * heads[0] * head_dim * pairs
    tensor = 2.0 * num_tokens * head_dim  # one head of q, k, v, out or a gradient of theirs
    return Workload(
        make_inputs=make_inputs,
        ours=lambda q, k, v: mixed_attention(q, k, v, intervals, rope, impl="triton"),
        baselines=others,
        unit="TF/s",
        work={
            "forward": Work(flops=2 * product, bytes=tensor * 2 * (heads[0] + heads[1])),
            "backward": Work(flops=5 * product, bytes=tensor * 4 * (heads[0] + heads[1])),
        },
        extra_times=extra,
    )


def attention_benchmarks() -> Iterator[Benchmark]:
    for mix, documents_of in MIXES.items():
        for (tensor_parallel, heads), num_tokens in itertools.product(HEADS.items(), TOKENS):
            if mix == "full" and num_tokens > 8192:
                continue  # no recipe has an image of that size
            yield Benchmark(
                operation="mixed_attention",
                case=f"{mix}, T={num_tokens}, TP={tensor_parallel}",
                guard=lambda device, mix=mix: _small_attention(mix, device),
                build=lambda device, of=documents_of, t=num_tokens, heads=heads: attention_workload(
                    of(t), heads, 128, rotate=False, device=device
                ),
                is_quick=(mix, tensor_parallel, num_tokens) in QUICK_ATTENTION,
            )
    five_images = many_image_documents(8192)
    yield Benchmark(
        operation="mixed_attention",
        case="five images with 2D-RoPE, T=8192, TP=1",
        guard=lambda device: _small_attention("five images", device, rotate=True),
        build=lambda device: attention_workload(five_images, HEADS[1], 128, rotate=True, device=device),
        is_quick=True,
    )
    yield Benchmark(
        operation="mixed_attention",
        case="five images, T=8192, 0.5B (14/2/64)",
        guard=lambda device: _small_attention("five images", device, head_dim=64),
        build=lambda device: attention_workload(five_images, (14, 2), 64, rotate=False, device=device),
    )


def _small_attention(mix: str, device: str, rotate: bool = False, head_dim: int = 128) -> Problem:
    """Seven query heads on one key head, as in the 7B model; an eighth of the head dimension on a CPU."""
    on_cpu = device == "cpu"
    return attention_problem(
        f"{mix}, rotated" if rotate else mix,
        SMALL_MIXES[mix],
        heads=(7, 1),
        head_dim=head_dim // 8 if on_cpu else head_dim,
        dtype=_guard_dtype(device),
        device=device,
        rotate=rotate,
    )


def gram_workload(lengths: tuple[int, ...], width: int, device: str = "cuda") -> Workload:
    num_rows = sum(lengths)
    teacher = random_tensor((num_rows, width), 0, device)
    # Forward: one triangle each of student and teacher. Backward: W z. Latents are read, the gradient written.
    flops = float(sum(2 * n * n * width for n in lengths))
    latents = 2.0 * num_rows * width
    return Workload(
        make_inputs=lambda seed: {"student": random_tensor((num_rows, width), seed + 1, device) + 0.1},
        ours=lambda student: gram_loss(student, teacher, lengths, impl="triton"),
        baselines=baselines.gram(teacher, lengths),
        unit="TF/s",
        work={
            "forward": Work(flops=flops, bytes=2 * latents),
            "backward": Work(flops=flops, bytes=2 * latents),
        },
    )


def gram_benchmarks() -> Iterator[Benchmark]:
    cases = {"64 x 729": (729,) * 64, "64 x 1024": (1024,) * 64, "16 x 576": (576,) * 16}
    cases["native resolution"] = tuple(200 + 97 * i % 900 for i in range(64))
    for name, lengths in cases.items():
        yield Benchmark(
            operation="gram_loss",
            case=f"{name}, K=3584",
            guard=lambda device: gram_problem("guard", (33, 7), device=device, dtype=_guard_dtype(device)),
            build=lambda device, lengths=lengths: gram_workload(lengths, 3584, device),
            is_quick=name in ("64 x 729", "64 x 1024"),
        )


def latent_workload(num_rows: int, num_masked: int, width: int, device: str = "cuda") -> Workload:
    teacher = random_tensor((num_rows, width), 0, device)
    rows = torch.randperm(num_rows, device=device)[:num_masked].sort().values

    def plain(student: Tensor) -> Tensor:
        target = torch.softmax(teacher[rows].float() / 0.04, -1)
        return -(target * torch.log_softmax(student[rows].float() / 0.1, -1)).sum()

    return Workload(
        make_inputs=lambda seed: {"student": random_tensor((num_rows, width), seed + 1, device)},
        ours=lambda student: latent_cross_entropy(student, teacher, rows, impl="triton"),
        baselines={"eager": lambda: plain, "compiled": lambda: baselines.compiled(plain)},
        unit="GB/s",
        # Read student and teacher and write the rows' gradient; then scale it into a tensor of zeros.
        work={
            "forward": Work(bytes=6.0 * num_masked * width),
            "backward": Work(bytes=4.0 * num_masked * width + 2.0 * num_rows * width),
        },
    )


def latent_benchmarks() -> Iterator[Benchmark]:
    for num_rows, num_masked in ((46656, 2332), (46656, 46656)):
        yield Benchmark(
            operation="latent_cross_entropy",
            case=f"{num_masked} of {num_rows} rows, K=3584",
            guard=lambda device: latent_problem(
                "guard", 9, (1, 4), device=device, dtype=_guard_dtype(device)
            ),
            build=lambda device, n=num_rows, m=num_masked: latent_workload(n, m, 3584, device),
            is_quick=True,
        )


def ema_workload(num_elements: int, device: str = "cuda") -> Workload:
    source = random_tensor((num_elements,), 0, device)
    copy = torch.empty(num_elements, dtype=BF16, device=device)

    def ours(average: Tensor) -> Tensor:
        ema_update_(average, source, 0.996, copy, impl="triton")
        return copy

    def foreach(average: Tensor) -> Tensor:
        wide = [source.float()]  # _foreach_lerp_ refuses fp32 <- bf16
        torch._foreach_lerp_([average], wide, 0.004)
        torch._foreach_copy_([copy], [average])
        return copy

    def plain(average: Tensor) -> Tensor:
        average.add_(0.004 * (source - average))
        return copy.copy_(average)

    return Workload(
        make_inputs=lambda seed: {"average": random_tensor((num_elements,), seed + 1, device).float()},
        ours=ours,
        baselines={
            "foreach": lambda: foreach,
            "eager": lambda: plain,
            "compiled": lambda: baselines.compiled(plain),
        },
        unit="GB/s",
        work={"forward": Work(bytes=12.0 * num_elements)},  # 4 + 2 bytes read, 4 + 2 written
    )


def ema_benchmarks() -> Iterator[Benchmark]:
    for num_elements in (2**26, 2**28):
        yield Benchmark(
            operation="ema_update_",
            case=f"{num_elements / 1e6:.0f}M elements, bf16 -> fp32 + bf16",
            guard=lambda device: ema_problem("guard", 5001, source_dtype=torch.float32, device=device),
            build=lambda device, n=num_elements: ema_workload(n, device),
            is_quick=True,
        )


def head_workload(num_rows: int, num_columns: int, width: int, device: str = "cuda") -> Workload:
    targets = torch.randint(0, num_columns, (num_rows,), device=device)

    def make_inputs(seed: int) -> Inputs:
        weight = random_tensor((num_columns, width), seed + 1, device) * width**-0.5
        return {"hidden": random_tensor((num_rows, width), seed, device), "weight": weight}

    gemm = 2.0 * num_rows * num_columns * width
    weights = 2.0 * num_columns * width
    return Workload(
        make_inputs=make_inputs,
        ours=lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, impl="triton"),
        baselines=baselines.head(targets),
        unit="TF/s",
        # Ours makes the gradients in the forward: only the sum compares. The weight is read twice, and its
        # gradient written once.
        work={"both": Work(flops=3 * gemm, bytes=3 * weights)},
    )


def head_benchmarks() -> Iterator[Benchmark]:
    for num_rows, tensor_parallel in ((2376, 1), (8192, 1), (2376, 4)):
        yield Benchmark(
            operation="linear_cross_entropy",
            case=f"{num_rows} rows, V=152064/{tensor_parallel}, D=3584",
            guard=lambda device: head_problem(
                "guard", 9, 50, chunk_rows=4, device=device, dtype=_guard_dtype(device)
            ),
            build=lambda device, n=num_rows, tp=tensor_parallel: head_workload(n, 152064 // tp, 3584, device),
            is_quick=num_rows == 2376,
        )


def _guard_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else BF16


def all_benchmarks() -> list[Benchmark]:
    return [
        *attention_benchmarks(),
        *gram_benchmarks(),
        *latent_benchmarks(),
        *ema_benchmarks(),
        *head_benchmarks(),
    ]
