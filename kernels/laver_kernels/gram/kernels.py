"""Gram loss kernels: row norms, upper-triangle Gram tiles with the loss in their epilogue, and one GEMM back.

With G_ij = r_i r_j <z_i, z_j>, r = 1 / ||z|| and R = max(0, G_s - G_t) (or the difference), the loss of an
image is ||R||_F^2 / n^2, and because R is symmetric dz_i = (4 / n^2) (sum_j W_ij z_j - c_i r_i^2 z_i) with
W = R_ij r_i r_j and c_i = sum_j R_ij G_ij. Only W, in the input's 16-bit dtype, outlives a tile.
"""

import triton
import triton.language as tl

SMALLEST_SQUARE = tl.constexpr(1e-24)


@triton.jit
def inverse_norms(S, T, R_S, R_T, width, stride_s, stride_t, WIDTH_STEP: tl.constexpr):
    """1 / ||row|| of student and teacher, 0 for a row of zeros; one row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH_STEP)
    square_s = tl.zeros((WIDTH_STEP,), tl.float32)
    square_t = tl.zeros((WIDTH_STEP,), tl.float32)
    for start in range(0, width, WIDTH_STEP):
        ok = start + column < width
        s = tl.load(S + row * stride_s + start + column, mask=ok, other=0.0).to(tl.float32)
        t = tl.load(T + row * stride_t + start + column, mask=ok, other=0.0).to(tl.float32)
        square_s += s * s
        square_t += t * t
    sum_s = tl.sum(square_s, 0)
    sum_t = tl.sum(square_t, 0)
    tl.store(R_S + row, tl.where(sum_s < SMALLEST_SQUARE, 0.0, 1.0 / tl.sqrt(tl.maximum(sum_s, 1e-30))))
    tl.store(R_T + row, tl.where(sum_t < SMALLEST_SQUARE, 0.0, 1.0 / tl.sqrt(tl.maximum(sum_t, 1e-30))))


@triton.jit
def _products(
    Z, row_i, row_j, ok_i, ok_j, width, stride, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<z_i, z_j> of two blocks of rows, in fp32."""
    depth = tl.arange(0, DEPTH)
    at_i = Z + row_i[:, None] * stride + depth[None, :]
    at_j = Z + row_j[:, None] * stride + depth[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, DEPTH):
        start = tl.multiple_of(start, DEPTH)
        if EVEN:
            a = tl.load(at_i + start, mask=ok_i[:, None], other=0.0)
            b = tl.load(at_j + start, mask=ok_j[:, None], other=0.0)
        else:
            in_width = (start + depth < width)[None, :]
            a = tl.load(at_i + start, mask=ok_i[:, None] & in_width, other=0.0)
            b = tl.load(at_j + start, mask=ok_j[:, None] & in_width, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def gram_forward(
    S, T, R_S, R_T, W, LOSS, DOTS, TILES, STARTS, LENGTHS, W_STARTS, num_rows, width, stride_s, stride_t,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, CLIP: tl.constexpr, WANT_GRAD: tl.constexpr,
    MIRROR: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one image: its share of the loss, of W and of the row dots c.

    With MIRROR tiles i <= j alone run, and each gives both triangles. DOTS is `[column tiles, N]`: a tile
    writes its row sums at its column, its mirror image's at its row, and the backward adds them in order, so
    that nothing depends on which program ran first.
    """
    pid = tl.program_id(0)
    image = tl.load(TILES + pid * 3)
    tile_i = tl.load(TILES + pid * 3 + 1)
    tile_j = tl.load(TILES + pid * 3 + 2)
    first = tl.load(STARTS + image)
    length = tl.load(LENGTHS + image)
    i = tile_i * BLOCK + tl.arange(0, BLOCK)
    j = tile_j * BLOCK + tl.arange(0, BLOCK)
    ok_i = i < length
    ok_j = j < length
    row_i = (first + i).to(tl.int64)
    row_j = (first + j).to(tl.int64)
    student = _products(S, row_i, row_j, ok_i, ok_j, width, stride_s, BLOCK, DEPTH, EVEN, PRECISION)
    r_i = tl.load(R_S + first + i, mask=ok_i, other=0.0)
    r_j = tl.load(R_S + first + j, mask=ok_j, other=0.0)
    student = student * (r_i[:, None] * r_j[None, :])
    teacher = _products(T, row_i, row_j, ok_i, ok_j, width, stride_t, BLOCK, DEPTH, EVEN, PRECISION)
    t_i = tl.load(R_T + first + i, mask=ok_i, other=0.0)
    t_j = tl.load(R_T + first + j, mask=ok_j, other=0.0)
    excess = student - teacher * (t_i[:, None] * t_j[None, :])
    if CLIP:
        excess = tl.maximum(excess, 0.0)
    # The diagonal is 1 - 1: leave it out rather than square its rounding.
    excess = tl.where((i[:, None] != j[None, :]) & ok_i[:, None] & ok_j[None, :], excess, 0.0)
    length_f = length.to(tl.float32)
    both_triangles = tl.where(tile_i == tile_j, 1.0, 2.0)
    tl.store(LOSS + pid, tl.sum(excess * excess) * both_triangles / (length_f * length_f))
    if WANT_GRAD:
        dots = excess * student
        dots_at = DOTS + first + tl.cast(tile_j, tl.int64) * num_rows
        tl.store(dots_at + i, tl.sum(dots, 1), mask=ok_i)
        weight = (excess * (r_i[:, None] * r_j[None, :])).to(W.dtype.element_ty)
        w_start = tl.multiple_of(tl.load(W_STARTS + image), 16)
        w_stride = tl.multiple_of((length + 7) // 8 * 8, 8)
        # The padding of a row is written too (zeros): the backward's vector loads reach it.
        ok = ok_i[:, None] & (j < w_stride)[None, :]
        tl.store(W + w_start + i.to(tl.int64)[:, None] * w_stride + j[None, :], weight, mask=ok)
        if MIRROR and tile_i != tile_j:
            mirror_at = DOTS + first + tl.cast(tile_i, tl.int64) * num_rows
            tl.store(mirror_at + j, tl.sum(dots, 0), mask=ok_j)
            mirror_ok = ok_j[:, None] & ok_i[None, :]
            mirror = W + w_start + j.to(tl.int64)[:, None] * w_stride + i[None, :]
            tl.store(mirror, tl.trans(weight), mask=mirror_ok)


@triton.jit
def gram_backward(
    W, S, R_S, DOTS, GRAD, DS, TILES, STARTS, LENGTHS, W_STARTS, num_rows, width, stride_s, stride_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DOTS_BLOCK: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS for ROWS tokens of one image and COLUMNS of the width: W z, minus the part along z_i itself."""
    pid = tl.program_id(1)
    image = tl.load(TILES + pid * 2)
    tile = tl.load(TILES + pid * 2 + 1)
    first = tl.load(STARTS + image)
    length = tl.load(LENGTHS + image)
    w_stride = tl.multiple_of((length + 7) // 8 * 8, 8)
    w_base = W + tl.multiple_of(tl.load(W_STARTS + image), 16)
    i = tile * ROWS + tl.arange(0, ROWS)
    ok_i = i < length
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < width
    depth = tl.arange(0, DEPTH)
    w_at = w_base + i.to(tl.int64)[:, None] * w_stride + depth[None, :]
    z_at = S + (first + depth).to(tl.int64)[:, None] * stride_s + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, DEPTH):
        in_image = start + depth < length
        w = tl.load(w_at + start, mask=ok_i[:, None] & (start + depth < w_stride)[None, :], other=0.0)
        if EVEN:
            z = tl.load(z_at + tl.cast(start, tl.int64) * stride_s, mask=in_image[:, None], other=0.0)
        else:
            z_ok = in_image[:, None] & in_width[None, :]
            z = tl.load(z_at + tl.cast(start, tl.int64) * stride_s, mask=z_ok, other=0.0)
        if WIDE:
            z = z.to(tl.float32)
        total = tl.dot(w, z, total, input_precision=PRECISION)

    dots = tl.zeros((ROWS,), tl.float32)
    for slot in range(0, tl.cdiv(length, DOTS_BLOCK)):
        dots += tl.load(DOTS + tl.cast(slot, tl.int64) * num_rows + first + i, mask=ok_i, other=0.0)
    r = tl.load(R_S + first + i, mask=ok_i, other=0.0)
    row = (first + i).to(tl.int64)[:, None]
    ok = ok_i[:, None] & in_width[None, :]
    z_i = tl.load(S + row * stride_s + column[None, :], mask=ok, other=0.0).to(tl.float32)
    length_f = length.to(tl.float32)
    scale = 4.0 * tl.load(GRAD) / (length_f * length_f)
    grad = scale * (total - (dots * r * r)[:, None] * z_i)
    tl.store(DS + row * stride_d + column[None, :], grad.to(DS.dtype.element_ty), mask=ok)
