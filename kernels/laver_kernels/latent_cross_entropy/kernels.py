"""Latent cross-entropy kernel: one masked row per program, loss and gradient in one pass over its logits."""

import triton
import triton.language as tl


@triton.jit
def latent_cross_entropy_rows(
    STUDENT, TEACHER, CENTER, ROWS, LOSS, GRAD, inverse_student, inverse_teacher, width, stride_s, stride_t,
    WIDTH_PAD: tl.constexpr, HAS_CENTER: tl.constexpr, WANT_GRAD: tl.constexpr,
):  # fmt: skip
    """LOSS `[M]`, GRAD `[M, K]` = (softmax(s) - softmax(t)) / tau_s; probabilities stay in registers."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(ROWS + pid)
    column = tl.arange(0, WIDTH_PAD)
    ok = column < width
    s = tl.load(STUDENT + row * stride_s + column, mask=ok, other=0.0).to(tl.float32)
    t = tl.load(TEACHER + row * stride_t + column, mask=ok, other=0.0).to(tl.float32)
    if HAS_CENTER:
        t = t - tl.load(CENTER + column, mask=ok, other=0.0).to(tl.float32)
    t = tl.where(ok, t * inverse_teacher, -float("inf"))
    t = tl.exp(t - tl.max(t, 0))
    target = t / tl.sum(t, 0)
    # Measured from the row's maximum, so that large logits neither overflow nor cancel in the loss.
    s = tl.where(ok, s * inverse_student, -float("inf"))
    s = s - tl.max(s, 0)
    e = tl.exp(s)
    total = tl.sum(e, 0)
    tl.store(LOSS + pid, tl.log(total) - tl.sum(target * tl.where(ok, s, 0.0), 0))
    if WANT_GRAD:
        grad = (e / total - target) * inverse_student
        tl.store(GRAD + pid * width + column, grad.to(GRAD.dtype.element_ty), mask=ok)
