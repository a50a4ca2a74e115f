"""LM head and cross-entropy on cuBLAS and Triton: chunks of logits, turned into their own gradient in place.

The gradients are made in the forward, as long as a chunk's logits exist: three GEMMs in all, where keeping
nothing would take a fourth. Scaling them by the incoming gradient is all that is left to the backward, and not even
that where the loss's weight is known beforehand: a weight's gradient of gigabytes is then not written twice.
"""

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.distributed import distributed_c10d

from laver_kernels.launch import on_device_of, want_kernel_dtype
from laver_kernels.linear_cross_entropy.kernels import logit_gradient, logit_statistics
from laver_kernels.linear_cross_entropy.shard import VocabularyShard

STEP = 4096


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    loss_weight: Tensor | None,
    shard: VocabularyShard,
    chunk_rows: int,
) -> Tensor:
    """The operation of `api.linear_cross_entropy` for fp16, bf16 and fp32."""
    want_kernel_dtype("linear_cross_entropy", hidden_ND)
    enabled = torch.is_grad_enabled()
    loss, _, _ = forward_op(
        hidden_ND,
        weight_VD,
        targets_N,
        loss_weight,
        "" if shard.group is None else shard.group.group_name,
        shard.start,
        shard.num_real,
        chunk_rows,
        enabled and hidden_ND.requires_grad,
        enabled and weight_VD.requires_grad,
    )
    return loss


@torch.library.custom_op("laver_kernels::linear_cross_entropy", mutates_args=())
def forward_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    loss_weight: Tensor | None,
    group_name: str,
    vocab_start: int,
    num_real: int,
    chunk_rows: int,
    want_hidden_grad: bool,
    want_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, times its weight, and for a gradient of 1 those of hidden and weight (empty where not wanted)."""
    group = _group(group_name)
    hidden, targets = hidden_ND.contiguous(), targets_N.contiguous()
    num_rows, num_columns = hidden.shape[0], weight_VD.shape[0]
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty_like(hidden) if want_hidden_grad else hidden.new_empty(0)
    dweight = None
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        logits = hidden[rows] @ weight_VD.T
        lse, picked = _reduced_statistics(logits, targets[rows], group, vocab_start, num_real)
        loss += (lse - picked).sum()
        if not (want_hidden_grad or want_weight_grad):
            continue
        with on_device_of(logits):
            logit_gradient[(len(logits), triton.cdiv(num_columns, STEP))](
                logits, targets[rows], lse, lse if loss_weight is None else loss_weight,
                vocab_start, num_real, num_columns, logits.stride(0), STEP=STEP, HAS_WEIGHT=loss_weight is not None,
            )  # fmt: skip
        if want_hidden_grad:
            torch.mm(logits, weight_VD, out=dhidden[rows])
        if want_weight_grad:
            dweight = _accumulated(dweight, logits.T @ hidden[rows], more=num_rows > chunk_rows)
    if group is not None and want_hidden_grad:
        dist.all_reduce(dhidden, group=group)
    if dweight is None:
        dweight = weight_VD.new_empty(0)
    return loss if loss_weight is None else loss * loss_weight, dhidden, dweight.to(weight_VD.dtype)


def _group(name: str) -> dist.ProcessGroup | None:
    """Operators take no process groups, only their names."""
    return distributed_c10d._resolve_process_group(distributed_c10d.GroupName(name)) if name else None


def _accumulated(total: Tensor | None, part: Tensor, more: bool) -> Tensor:
    """Sums the chunks' weight gradients in fp32; a single chunk's is taken as it is."""
    if total is None:
        return part.float() if more else part
    return total.add_(part)


def _reduced_statistics(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None, vocab_start: int, num_real: int
) -> tuple[Tensor, Tensor]:
    """log-sum-exp over the whole vocabulary and the target's logit, per row."""
    row_max, row_sum, picked = logits.new_empty(3, len(logits), dtype=torch.float32).unbind()
    with on_device_of(logits):
        logit_statistics[(len(logits),)](
            logits, targets, row_max, row_sum, picked, vocab_start, num_real, logits.stride(0),
            STEP=STEP, num_warps=8,
        )  # fmt: skip
    if group is not None:
        local_max = row_max.clone()
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group=group)
        both = torch.stack([row_sum * torch.exp(local_max - row_max), picked])
        dist.all_reduce(both, group=group)
        row_sum, picked = both.unbind()
    return row_max + torch.log(row_sum), picked


@forward_op.register_fake
def _(
    hidden,
    weight,
    targets,
    loss_weight,
    group_name,
    vocab_start,
    num_real,
    chunk_rows,
    want_hidden_grad,
    want_weight_grad,
):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if want_hidden_grad else (0,)),
        weight.new_empty(weight.shape if want_weight_grad else (0,)),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)
    ctx.wanted = inputs[-2:]
    ctx.is_weighted = inputs[3] is not None


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    if ctx.is_weighted:
        # Asserted on the device: looking at the value would wait for it.
        torch._assert_async(
            grad == 1, "linear_cross_entropy: with loss_weight the loss's gradient has to be 1"
        )
    grads = [
        (saved if ctx.is_weighted else (saved * grad).to(saved.dtype)) if wanted else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return *grads, *(None,) * 8


forward_op.register_autograd(_backward, setup_context=_save_for_backward)
