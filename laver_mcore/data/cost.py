"""What a dialogue costs to train on beyond its length, so that rows and ranks can be evened out.

The unit is one token's forward and backward through the decoder's matrices. A packed row pays `seq_length` of them
whatever it holds, for padding is computed as well; what differs between rows is attention, the LM head, and all
that images add: the tower, the pairs they see both ways, LaVer's reconstruction and its teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Forward passes' worth of arithmetic in forward and backward together.
MATRIX_PASSES = 3.0  # two products in the backward of every product
ATTENTION_PASSES = 3.5  # five products in the backward of the two in the forward: scores are recomputed


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Multiply-adds of one forward pass through a stack of layers."""

    token: int  # of one token, in the matrices
    pair: int  # of one query and one key that it sees

    @classmethod
    def of(
        cls,
        *,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        num_key_heads: int,
        head_dim: int,
        ffn_size: int,
        ffn_matrices: int,
    ) -> "TransformerShape":
        """From the usual sizes; `ffn_matrices` is 3 for SwiGLU, else 2."""
        attention = hidden_size * head_dim * 2 * (num_heads + num_key_heads)
        return cls(
            token=num_layers * (attention + ffn_matrices * hidden_size * ffn_size),
            pair=num_layers * 2 * num_heads * head_dim,
        )


@dataclass(frozen=True, kw_only=True)
class PackingCost:
    """Cost of a dialogue in token units, linear in four numbers that its index knows.

    What is learned of a text is not among them, so the LM head is charged for all of it.
    """

    text_token: float
    pair: float  # of text-causal attention: L (L + 1) / 2 of them in L tokens
    visual_token: float
    visual_pair: float  # N^2 of them in an image of N tokens

    def documents(
        self,
        lengths: Sequence[int] | np.ndarray,
        visual: Sequence[int] | np.ndarray,
        squares: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """int64 [n]: costs of dialogues of `lengths` tokens, `visual` of them in images whose squares sum to `squares`.

        Rounded to whole units, so that every machine packs alike.
        """
        length, visual, square = (np.asarray(part, dtype=np.float64) for part in (lengths, visual, squares))
        cost = self.text_token * (length - visual) + self.pair * length * (length + 1) / 2
        return np.rint(cost + self.visual_token * visual + self.visual_pair * square).astype(np.int64)


def packing_cost(
    decoder: TransformerShape,
    *,
    lm_head: int,
    mixed: bool,
    vision_head: int | None,
    gram_width: int,
    tower: TransformerShape | None,
    tower_trains: bool,
    patches_per_token: int,
) -> PackingCost:
    """Weights from the model's shape, all in multiply-adds of one forward pass.

    `lm_head` and `vision_head` are those of one token, `vision_head` None without Laver's losses; `gram_width` is the
    width of Gram matrices, 0 without; `patches_per_token` patches of the tower are merged into one visual token.
    """
    unit = MATRIX_PASSES * decoder.token
    visual_token = visual_pair = 0.0
    if mixed:  # N (N - 1) / 2 pairs that causal attention lacks
        visual_token -= ATTENTION_PASSES * decoder.pair / 2
        visual_pair += ATTENTION_PASSES * decoder.pair / 2
    if vision_head is not None:  # the student's rows, and the teacher's, which have no backward
        visual_token += (MATRIX_PASSES + 1) * (decoder.token + vision_head)
        visual_pair += (ATTENTION_PASSES + 1) * decoder.pair + (MATRIX_PASSES + 1) * gram_width
    if tower is not None:
        passes, attention = (MATRIX_PASSES, ATTENTION_PASSES) if tower_trains else (1.0, 1.0)
        visual_token += passes * tower.token * patches_per_token
        visual_pair += attention * tower.pair * patches_per_token**2
    return PackingCost(
        text_token=MATRIX_PASSES * lm_head / unit,
        pair=ATTENTION_PASSES * decoder.pair / unit,
        visual_token=visual_token / unit,
        visual_pair=visual_pair / unit,
    )
