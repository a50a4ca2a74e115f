"""What the ahead-of-time gate compiles: every kernel with the argument types of a bf16 7B model."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from laver_kernels.configs import SPECIALISED_TILE, TILES_OF, Tile, attention_tile, gram_tile, padded
from laver_kernels.ema.kernels import ema_step
from laver_kernels.gram.kernels import gram_backward, gram_forward, inverse_norms
from laver_kernels.latent_cross_entropy.kernels import latent_cross_entropy_rows
from laver_kernels.linear_cross_entropy.kernels import logit_gradient, logit_statistics
from laver_kernels.mixed_attention.backward_kernels import attention_backward_dkdv, attention_backward_dq
from laver_kernels.mixed_attention.forward_kernel import attention_forward
from laver_kernels.mixed_attention.rotation_kernels import combine_partials, rotate_queries_and_keys
from laver_kernels.mixed_attention.specialised_kernel import attention_forward_specialised

UNSPECIALIZED = {"num_keys"}  # one kernel serves every value
TRITON_STAGES = 3  # Triton's default, where a launch names none


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel, its argument types, constants, and the arguments known to be multiples of 16."""

    name: str
    arch: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    tile: Tile
    is_matmul: bool = True


def make_case(
    name: str, arch: str, kernel: Any, types: str, constants: dict, tile: Tile, **more: Any
) -> Case:
    """`types` gives one type per argument that is no constant; at the 7B shapes all but fp32 numbers divide by 16."""
    runtime = [argument for argument in kernel.arg_names if argument not in constants]
    signature = dict(zip(runtime, types.split(), strict=True))
    divisible = {argument for argument, kind in signature.items() if kind != "fp32"} - UNSPECIALIZED
    return Case(
        name=name,
        arch=arch,
        kernel=kernel,
        signature=signature,
        constants=constants,
        divisible=frozenset(divisible),
        tile=tile,
        **more,
    )


def attention_case(arch: str, kernel: str, head_dim: int, tile: Tile | None = None) -> Case:
    """One of the three attention kernels for the 7B model's seven query heads per key head."""
    tile = tile or attention_tile(kernel, arch, head_dim, torch.bfloat16)
    constants: dict[str, Any] = {
        "GROUP": 7,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "HALF": head_dim // 2,
        "HALF_PAD": padded(head_dim) // 2,
        "PRECISION": "tf32",
    }
    tensor, stat, index, strides = "*bf16", "*fp32", "*i32", "i32 " * 7
    if kernel == "forward":
        types = f"{tensor} {tensor} {tensor} {tensor} {stat} {index} {index} fp32 i32 i32 {strides}"
        function = attention_forward
    elif kernel == "dq":
        types = f"{(tensor + ' ') * 5} {(stat + ' ') * 3} {tensor} {stat} {stat} {index} {index} "
        types += f"fp32 fp32 i32 i32 {strides}"
        function = attention_backward_dq
        constants |= {"ROTATE": True, "HAS_DLSE": False}
    else:
        types = f"{(tensor + ' ') * 4} {(stat + ' ') * 4} {index} {index} fp32 i32 i32 {strides}"
        function = attention_backward_dkdv
        constants["HEADS_EACH"] = 1
    return make_case(f"attention {kernel} d{head_dim}", arch, function, types, constants, tile)


def specialised_case() -> Case:
    """The warp-specialised forward, for sm_90 alone."""
    tile, plain = SPECIALISED_TILE, attention_case("sm_90", "forward", 128)
    return dataclasses.replace(
        plain,
        name="attention forward specialised d128",
        kernel=attention_forward_specialised,
        constants={name: plain.constants[name] for name in ("GROUP", "HALF", "PRECISION")}
        | {"ROWS": tile.rows, "COLUMNS": tile.columns},
        tile=tile,
    )


def rotation_cases(arch: str) -> list[Case]:
    """The elementwise kernels around attention."""
    tile = Tile(rows=16, columns=128, num_stages=TRITON_STAGES)
    shape = {"ROWS": 16, "HALF": 64, "HALF_PAD": 64}
    return [
        make_case(
            "attention rotate d128", arch, rotate_queries_and_keys,
            "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 i32 i32 i32 i32 i32",
            {"HEADS": 28, "GROUPS": 4, **shape}, tile, is_matmul=False,
        ),
        make_case(
            "attention combine d128", arch, combine_partials,
            "*fp32 *fp32 *bf16 *bf16 *fp32 *fp32 fp32 i32",
            {"GROUPS": 4, "SPLITS": 7, "ROTATE": True, **shape}, tile, is_matmul=False,
        ),
    ]  # fmt: skip


def gram_cases(arch: str) -> list[Case]:
    """The Gram kernels for a width of 3584."""
    forward, back = gram_tile("forward", arch, torch.bfloat16), gram_tile("backward", arch, torch.bfloat16)
    precision = {"PRECISION": "tf32"}
    return [
        make_case(
            "gram norms", arch, inverse_norms, "*bf16 *bf16 *fp32 *fp32 i32 i32 i32",
            {"WIDTH_STEP": 2048}, Tile(rows=1, columns=2048, num_stages=TRITON_STAGES), is_matmul=False,
        ),
        *(
            make_case(
                name, arch, gram_forward,
                "*bf16 *bf16 *fp32 *fp32 *bf16 *fp32 *fp32 *i32 *i32 *i32 *i64 i32 i32 i32 i32",
                {"BLOCK": forward.rows, "DEPTH": forward.depth, "CLIP": True, "WANT_GRAD": True,
                 "MIRROR": mirror, "EVEN": True} | precision, forward,
            )
            for name, mirror in (("gram forward", True), ("gram forward slab", False))
        ),
        make_case(
            "gram backward", arch, gram_backward,
            "*bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *i32 *i32 *i32 *i64 i32 i32 i32 i32",
            {"ROWS": back.rows, "COLUMNS": back.columns, "DEPTH": back.depth, "DOTS_BLOCK": forward.rows,
             "EVEN": True, "WIDE": False} | precision, back,
        ),
    ]  # fmt: skip


def elementwise_cases(arch: str) -> list[Case]:
    """The row-wise and flat kernels."""
    return [
        make_case(
            "latent cross-entropy", arch, latent_cross_entropy_rows,
            "*bf16 *bf16 *fp32 *i64 *fp32 *bf16 fp32 fp32 i32 i32 i32",
            {"WIDTH_PAD": 4096, "HAS_CENTER": True, "WANT_GRAD": True},
            Tile(rows=1, columns=4096, num_warps=8, num_stages=TRITON_STAGES), is_matmul=False,
        ),
        make_case(
            "ema", arch, ema_step, "*fp32 *bf16 *bf16 *fp32 fp32 i32",
            {"BLOCK": 4096, "MOMENTUM_ON_DEVICE": False, "HAS_COPY": True},
            Tile(rows=1, columns=4096, num_warps=8, num_stages=TRITON_STAGES), is_matmul=False,
        ),
        make_case(
            "logit statistics", arch, logit_statistics, "*bf16 *i64 *fp32 *fp32 *fp32 i32 i32 i32",
            {"STEP": 4096}, Tile(rows=1, columns=4096, num_warps=8, num_stages=TRITON_STAGES), is_matmul=False,
        ),
        make_case(
            "logit gradient", arch, logit_gradient, "*bf16 *i64 *fp32 *fp32 i32 i32 i32 i32",
            {"STEP": 4096, "HAS_WEIGHT": False}, Tile(rows=1, columns=4096, num_stages=TRITON_STAGES), is_matmul=False,
        ),
    ]  # fmt: skip


def all_cases() -> list[Case]:
    """Every configuration of `configs.py`; head dimension 80 stands for the padded ones.

    Of an architecture that takes the tiles of another, the matrix kernels alone.
    """
    cases = []
    for arch in ("sm_80", "sm_90"):
        for kernel in ("forward", "dq", "dkdv"):
            cases += [attention_case(arch, kernel, head_dim) for head_dim in (64, 80, 128)]
        if arch == "sm_90":
            cases.append(specialised_case())
        cases += rotation_cases(arch) + gram_cases(arch) + elementwise_cases(arch)
    for arch, other in TILES_OF.items():
        borrowed = [attention_case(other, kernel, 128) for kernel in ("forward", "dq", "dkdv")]
        borrowed += [case for case in gram_cases(other) if case.is_matmul]
        cases += [dataclasses.replace(case, arch=arch) for case in borrowed]
    return cases
