"""What a dialogue costs to train on beyond its length, so that rows and ranks can be evened out.

The unit is one token's forward and backward through the decoder's matrices; every token of a dialogue pays one. What
differs beyond that is attention, the LM head, and all that images add: the tower, the pairs they see both ways, LaVer's
reconstruction and its teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PackingCost:
    """Cost of a dialogue in token units, linear in four numbers that its index knows.

    What is learned of a text is not among them, so the LM head is charged for all of it.
    """

    text_token: float
    pair: float  # of causal attention: L (L + 1) / 2 of them in L tokens
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
