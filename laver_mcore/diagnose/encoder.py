"""A vision encoder of transformers as a reference for CKNNA."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from laver_mcore.diagnose import measures
from laver_mcore.diagnose.reading import Question, Reading


class Encoder:
    """Patch states of a local directory's encoder, brought to a model's grid of visual tokens."""

    def __init__(self, path: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        model: Any = AutoModel.from_pretrained(path, local_files_only=True)
        self.model = getattr(model, "vision_model", model).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)

    @torch.no_grad()
    def __call__(self, image: Any, grid: tuple[int, int]) -> torch.Tensor:
        """Last states at each of the grid's places, [N, E], without class token and registers."""
        inputs = self.processor(images=image.convert("RGB"), return_tensors="pt")
        states_TE = self.model(**inputs).last_hidden_state[0]
        side = math.isqrt(len(states_TE))
        map_E = states_TE[len(states_TE) - side * side :].T.unflatten(1, (side, side))
        return F.adaptive_avg_pool2d(map_E, grid).flatten(1).T


def alignments(encoder: Encoder, questions: Sequence[Question], readings: Sequence[Reading]) -> list[float]:
    """CKNNA of each layer's visual tokens with the encoder's, mean over images, up to 10 neighbours."""
    values = []
    for question, reading in zip(questions, readings, strict=True):
        wanted = encoder(question.image, reading.grid)
        nearby = min(10, len(wanted) - 1)
        values.append([measures.cknna(states, wanted, nearby) for states in reading.visual])
    return torch.tensor(values).mean(0).tolist()
