"""Forward kernel of mixed attention for sm_90: warps that copy beside warps that multiply.

One warp streams keys and values through tensor descriptors while two groups of four warps, 64 rows each and out of
step with one another, multiply and take the softmax; Triton makes them of one loop. It does so only for a single loop
without a branch, so that every step carries the mask, and only where all that the loop needs, the intervals included,
is loaded through descriptors.
"""

import triton
import triton.language as tl

from laver_kernels.mixed_attention.forward_kernel import finish, fold
from laver_kernels.mixed_attention.tiles import LOWEST, hide, phase_bounds, reach_of


@triton.jit(do_not_specialize=["num_keys"])
def attention_forward_specialised(
    Q, K, V, OUT, LSE, ROW_LO, ROW_HI, scale_log2, num_tokens, num_keys,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`attention_forward` for head dimensions that are powers of two, and 16-byte aligned rows."""
    D: tl.constexpr = 2 * HALF
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    group = head // GROUP
    row_start = tile * ROWS
    row = row_start + tl.arange(0, ROWS)
    is_real = row < num_tokens
    lo_rows = tl.make_tensor_descriptor(ROW_LO, [num_tokens], [1], [ROWS])
    hi_rows = tl.make_tensor_descriptor(ROW_HI, [num_tokens], [1], [ROWS])
    q_rows = tl.make_tensor_descriptor(
        Q + tl.cast(head, tl.int64) * stride_qh, [num_tokens, D], [stride_qt, 1], [ROWS, D]
    )
    k_rows = tl.make_tensor_descriptor(
        K + tl.cast(group, tl.int64) * stride_kh, [num_keys, D], [stride_kt, 1], [COLUMNS, D]
    )
    v_rows = tl.make_tensor_descriptor(
        V + tl.cast(group, tl.int64) * stride_vh, [num_keys, D], [stride_vt, 1], [COLUMNS, D]
    )
    # What lies past the last row or key is read as zeros: an empty interval, and a key that no interval reaches.
    lo, hi, q = lo_rows.load([row_start]), hi_rows.load([row_start]), q_rows.load([row_start, 0])
    middle, reach = reach_of(lo, hi)
    start, _, _, end = phase_bounds(
        tl.load(ROW_LO + row, mask=is_real, other=0), tl.load(ROW_HI + row, mask=is_real, other=0),
        is_real, num_keys, COLUMNS,
    )  # fmt: skip
    key = tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, D), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), LOWEST, tl.float32)
    for key_start in tl.range(start, end, COLUMNS, warp_specialize=True):
        score = tl.dot(q, k_rows.load([key_start, 0]).T, input_precision=PRECISION)
        score = hide(score, key_start, key[None, :], middle[:, None], reach[:, None], True)
        v = v_rows.load([key_start, 0])
        acc, row_sum, row_max = fold(acc, row_sum, row_max, score, v, scale_log2, PRECISION)
    column = tl.arange(0, D)
    finish(
        acc, row_sum, row_max, OUT + head * D, LSE + tl.cast(head, tl.int64) * num_tokens, row_start, row,
        is_real, column, column >= 0, stride_ot, ROWS,
    )  # fmt: skip
