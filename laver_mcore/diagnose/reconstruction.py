"""What a trained student makes of masked visual tokens: the teacher's token that its prediction is nearest to.

Shapes: N visual tokens of all pictures, K latent width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from laver_mcore.data.sequence.batch import Batch
from laver_mcore.diagnose.reading import cells, from_cells
from laver_mcore.generate import evaluation_mode
from laver_mcore.model.inputs import model_inputs, num_student_rows
from laver_mcore.model.method import Entering
from laver_mcore.model.network import Network
from laver_mcore.objectives.objective import image_masks, joined

_GREY = 128


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Of several pictures: which tokens were masked, and the teacher's token nearest to each prediction."""

    images: Sequence[Image.Image]
    grids: Sequence[tuple[int, int]]
    masked_N: np.ndarray
    nearest_N: np.ndarray
    """Numbers of tokens of all pictures."""

    @property
    def found(self) -> float:
        """Share of masked tokens whose prediction is nearest to the teacher's own token in that place."""
        return float(np.mean(self.nearest_N[self.masked_N] == np.flatnonzero(self.masked_N)))

    @property
    def sentence(self) -> str:
        """What the pictures show, and how often."""
        count, total = int(self.masked_N.sum()), len(self.masked_N)
        return (
            f"Of {count} masked tokens of {len(self.images)} held-out pictures, {self.found:.1%} are predicted nearest "
            f"to the teacher's token of that very place, of {total} tokens to choose from (by chance {1 / total:.2%})."
        )

    def pictures(self) -> list[tuple[Image.Image, Image.Image, Image.Image]]:
        """Each picture as it is, with its masked tokens grey, and with what they were taken for in their place."""
        cut = [cells(image, grid) for image, grid in zip(self.images, self.grids, strict=True)]
        every = np.concatenate(cut)
        starts = np.cumsum([0, *map(len, cut)])
        shown = []
        for number, grid in enumerate(self.grids):
            here = slice(starts[number], starts[number + 1])
            masked, found = every[here].copy(), every[here].copy()
            masked[self.masked_N[here]] = _GREY
            found[self.masked_N[here]] = every[self.nearest_N[here][self.masked_N[here]]]
            whole, seen, made = (from_cells(each, grid) for each in (cut[number], masked, found))
            shown.append((whole, seen, made))
        return shown


@dataclass(frozen=True)
class _Masking:
    """A pass with the mask token in the place of masked visual tokens."""

    mask_token: torch.Tensor
    masked_N: torch.Tensor
    teacher: Any = None
    taps: tuple[int, ...] = ()

    def enter(self, visual_ND: torch.Tensor, plan: Any) -> Entering:
        hidden_ND = torch.where(self.masked_N[:, None], self.mask_token, visual_ND)
        return Entering(dialogue_ND=visual_ND, images_ND=hidden_ND)

    def target(self, states_ND: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the teacher has a pass of its own")


def last_masks(network: Network, batch: Batch) -> np.ndarray:
    """Which visual tokens the run masks at its last iteration, bool [N]."""
    return joined(image_masks(network.config, batch, network.config.train.train_iters - 1))


def latents(network: Network, batch: Batch, masked_N: np.ndarray) -> torch.Tensor:
    """What the vision head makes of pictures' rows [N, K] in a pass of one process that does not see what is masked."""
    (chunk,) = network.chunks
    rows = num_student_rows(batch, True, network.config.data.pad_to_multiple)
    kind: dict[str, Any] = dict(num_shares=1, device=network.topology.device)
    inputs = model_inputs(batch, rows, reconstruct=True, geometry=network.geometry, **kind)
    hidden_N = torch.from_numpy(masked_N).to(network.topology.device)
    with evaluation_mode(network.chunks):
        output = chunk(inputs, _Masking(chunk.mask_token, hidden_N))
        return chunk.vision_head(output.images_ND).float()


def nearest(student_NK: torch.Tensor, teacher_NK: torch.Tensor) -> np.ndarray:
    """Number of the teacher's token with the largest cosine to each of the student's, [N]."""
    return (F.normalize(student_NK, dim=-1) @ F.normalize(teacher_NK, dim=-1).T).argmax(1).cpu().numpy()
