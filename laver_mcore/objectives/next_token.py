"""Language-model loss: next-token cross-entropy over the supervised rows."""

import torch
from torch.distributed import ProcessGroup

from laver_kernels import linear_cross_entropy
from laver_mcore.model.method import ModelOutput


def next_token_sum(
    output: ModelOutput,
    labels_T: torch.Tensor,
    supervised_rows_M: torch.Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup,
    share: tuple[int, int] = (0, 1),
    impl: str = "auto",
) -> torch.Tensor:
    """Summed cross-entropy over supervised tokens, fp32 scalar; the LM head runs on those rows alone.

    `labels_T` are the next-token ids of the dialogue's rows; `vocab_size` is the one before padding. `share` = (i, n)
    takes the i-th of n parts of the supervised rows; the sums of all parts add up.
    """
    rows = supervised_rows_M.tensor_split(share[1])[share[0]]
    weight_VD = output.output_weight_VD
    return linear_cross_entropy(
        output.dialogue_TD.index_select(0, rows),
        weight_VD,
        labels_T.index_select(0, rows),
        tp_group=tp_group,
        vocab_start=tp_group.rank() * weight_VD.shape[0],
        vocab_size=vocab_size,
        impl=impl,  # type: ignore[arg-type]
    )
