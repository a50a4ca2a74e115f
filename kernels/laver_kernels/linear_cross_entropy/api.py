"""Next-token loss on gathered rows: the LM head and its cross-entropy without the logits of a whole batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from laver_kernels.backend import Impl, choose
from laver_kernels.checks import autocast_dtype, can_read, want_tensor
from laver_kernels.linear_cross_entropy import reference
from laver_kernels.linear_cross_entropy.shard import VocabularyShard

NAME = "linear_cross_entropy"
CHUNK_ROWS = 4096  # 4096 rows of 152,064 bf16 logits are 1.2 GB


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    loss_weight: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
    impl: Impl = "auto",
) -> Tensor:
    """Sum over N rows of the cross-entropy of `hidden @ weight^T` against `targets_N`, an fp32 (fp64) scalar.

    Gather the supervised rows before calling. `targets_N` are int64 columns of the whole vocabulary. With
    `tp_group`, `weight_VD` is this rank's shard, whose first row is column `vocab_start`; every rank gives
    the same rows and gets the same loss, and the gradient of `hidden_ND` is summed over the group. Columns
    from `vocab_size` on are padding and take no part. At most `chunk_rows` rows of logits exist at a time.
    `loss_weight`, an fp32 (fp64) scalar, multiplies the loss; the gradients are then finished in the forward, and
    nothing may multiply the loss afterwards.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a vocabulary range that holds no column, and
            for CPU tensors a target outside the vocabulary.
    """
    want_tensor(NAME, "hidden_ND", hidden_ND, ("N", "D"))
    dtype = autocast_dtype(hidden_ND.device)
    if dtype is not None:
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    num_rows, width = hidden_ND.shape
    device = hidden_ND.device
    want_tensor(NAME, "weight_VD", weight_VD, ("V", width), (hidden_ND.dtype,), device)
    want_tensor(NAME, "targets_N", targets_N, (num_rows,), (torch.int64,), device)
    if loss_weight is not None:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        want_tensor(NAME, "loss_weight", loss_weight, (), (wide,), device)
    if chunk_rows < 1:
        raise ValueError(f"{NAME}: chunk_rows={chunk_rows}, want at least 1")
    shard = _shard(weight_VD.shape[0], tp_group, vocab_start, vocab_size)
    if can_read(targets_N) and num_rows:
        low, high = int(targets_N.min()), int(targets_N.max())
        if low < 0 or high >= shard.vocab_size:
            raise ValueError(
                f"{NAME}: targets_N reaches [{low}, {high}], want within [0, {shard.vocab_size})"
            )
    backend = choose(impl, hidden_ND, NAME)
    with torch.autocast(device.type, enabled=False):
        if num_rows == 0:
            return (hidden_ND.sum() + weight_VD[:0].sum()).to(
                torch.promote_types(hidden_ND.dtype, torch.float32)
            )
        if backend == "triton":
            from laver_kernels.linear_cross_entropy import triton

            return triton.linear_cross_entropy(
                hidden_ND, weight_VD, targets_N, loss_weight, shard, chunk_rows
            )
        return reference.linear_cross_entropy(hidden_ND, weight_VD, targets_N, loss_weight, shard, chunk_rows)


def _shard(
    num_columns: int, tp_group: dist.ProcessGroup | None, vocab_start: int, vocab_size: int | None
) -> VocabularyShard:
    num_ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    if num_ranks == 1:
        tp_group = None
    if vocab_size is None:
        vocab_size = vocab_start + num_columns if tp_group is None else num_columns * num_ranks
    if vocab_start < 0 or vocab_size < 1 or (tp_group is None and vocab_start != 0):
        raise ValueError(
            f"{NAME}: vocab_start={vocab_start}, vocab_size={vocab_size} over {num_ranks} rank(s), want a "
            "start of 0 on one rank and at least one column"
        )
    if tp_group is None and vocab_size > num_columns:
        raise ValueError(f"{NAME}: vocab_size={vocab_size}, want at most the {num_columns} rows of weight_VD")
    num_real = min(num_columns, max(0, vocab_size - vocab_start))
    return VocabularyShard(start=vocab_start, num_real=num_real, vocab_size=vocab_size, group=tp_group)
