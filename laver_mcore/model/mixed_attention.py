"""Mixed attention with 2D rotary positions as Megatron's `core_attention`."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from laver_kernels import Intervals, mixed_attention
from laver_mcore.model.context_parallel import heads_to_rows, rows_to_heads


@dataclass
class PackedLayout(PackedSeqParams):
    """What attention must know of a packed micro-batch, carried through Megatron's own plumbing to every layer.

    Megatron hands `packed_seq_params` unchanged from the model to `core_attention`; the "thd" format makes it pass
    queries, keys and values as [T, heads, channels]. Built once per micro-batch, shared by all layers.
    """

    qkv_format: str = "thd"
    intervals: Intervals | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None


class MixedAttention(MegatronModule):
    """Attention in which each row sees one interval of keys (LaVer, arXiv 2512.06281, section 3.3).

    query [T, H, C], key and value [T, G, C] -> [T, H * C], for this rank's H query and G key/value heads. Under context
    parallelism T are this rank's rows, and the layout is that of all ranks' rows together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        impl: Any = "auto",
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.impl = impl
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        assert isinstance(packed_seq_params, PackedLayout)
        assert packed_seq_params.intervals is not None
        shared = self.cp_group.size() > 1
        if shared:
            query, key, value = rows_to_heads(query, key, value, self.cp_group)
        out_THC = mixed_attention(
            query, key, value, packed_seq_params.intervals, packed_seq_params.rope, impl=self.impl
        )
        if shared:
            out_THC = heads_to_rows(out_THC, self.cp_group)
        return out_THC.flatten(1)
