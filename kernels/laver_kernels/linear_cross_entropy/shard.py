"""Which columns of the vocabulary this rank holds, and with whom it shares the rest."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """Columns `[start, start + num_real)` are real; those after them in the weight are padding."""

    start: int
    num_real: int
    vocab_size: int  # real columns over all ranks
    group: dist.ProcessGroup | None  # None: this rank holds the whole vocabulary
