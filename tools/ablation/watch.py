"""What an ablation sees of held-out pages while a cell trains.

Shapes: N visual tokens of a batch, D width, K latent width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from laver_mcore.convert.probe import probe
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.diagnose import measures
from laver_mcore.generate import evaluation_mode
from laver_mcore.model.inputs import ModelInputs, model_inputs, num_student_rows
from laver_mcore.objectives.laver import Laver
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.engine import Engine


def less_alike(student_NK: torch.Tensor, teacher_NK: torch.Tensor, image_lengths: tuple[int, ...]) -> float:
    """Share of an image's pairs of different tokens that are less alike in the student than in the teacher.

    Mean over images. The clipped Gram loss leaves these pairs alone; the symmetric one pulls them together.
    """
    shares = []
    for student, teacher in zip(
        student_NK.split(image_lengths), teacher_NK.split(image_lengths), strict=True
    ):
        below = (measures.gram(student) < measures.gram(teacher)).triu(1)
        shares.append(below.sum().item() / (len(student) * (len(student) - 1) / 2))
    return sum(shares) / len(shares)


@dataclass(frozen=True)
class Watch:
    """Similarity and effective rank of every layer, and the student's pairs against the teacher's; one process."""

    engine: Engine
    batch: Batch
    """Held-out pages; the same in all cells of a task."""
    interval: int

    def due(self, iteration: int, *, exiting: bool) -> bool:
        return exiting or iteration % self.interval == 0

    def __call__(self, progress: Progress) -> dict[str, float | None]:
        """Entries of the metrics line."""
        found = probe(
            self.engine.chunks,
            self.batch,
            self.engine.geometry,
            self.engine.topology,
            self.engine.vocab_size,
        )
        entries: dict[str, float | None] = {}
        for layer, states_TD in found.layers.items():
            images = states_TD[self.batch.visual_rows_N].split(self.batch.image_lengths)
            for name, measure in (("similarity", measures.similarity), ("rank", measures.effective_rank)):
                entries[f"{name}_{layer + 1}"] = sum(map(measure, images)) / len(images)
        if isinstance(self.engine.objective, Laver):
            entries["less_alike"] = self._less_alike(self.engine.objective, progress.iteration)
        return entries

    @cached_property
    def _inputs(self) -> ModelInputs:
        rows = num_student_rows(self.batch, True, self.engine.config.data.pad_to_multiple)
        kind: dict[str, Any] = dict(num_shares=1, device=self.engine.topology.device)
        return model_inputs(self.batch, rows, reconstruct=True, geometry=self.engine.geometry, **kind)

    def _less_alike(self, objective: Laver, iteration: int) -> float:
        """Of the pass that training makes: masked pages for the student, whole ones for the teacher."""
        (chunk,) = self.engine.chunks
        with torch.no_grad(), evaluation_mode(self.engine.chunks):
            output = chunk(self._inputs, objective, objective.plan(self.batch, iteration - 1))
            student_NK = objective.target(output.images_ND)
        return less_alike(student_NK, output.target_NK, self.batch.image_lengths)
