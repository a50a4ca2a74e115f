"""What one step contains, counted exactly from its batches: rows, attention pairs, patches. Host arithmetic alone."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from laver_mcore.config.schema import Config
from laver_mcore.config.towers.spec import TowerShape
from laver_mcore.shapes.towers import tower_shape

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Counts over all micro-batches and data-parallel ranks of one step (or of a part of it: they add up)."""

    dialogue_rows: int = 0
    """T: dialogue tokens, text and visual, without padding."""
    dialogue_pairs: int = 0
    """(query, key) pairs that the mixed mask lets through in the dialogue: the sum of its intervals' lengths."""
    visual_tokens: int = 0
    """N: visual tokens; as many rows as the reconstruction sequence and the teacher's have."""
    reconstruction_pairs: int = 0
    """(query, key) pairs of the reconstruction sequence: the sum over images of (h w)^2."""
    student_padding: int = 0
    """Rows of the student's passes that hold nothing."""
    teacher_padding: int = 0
    """Rows of the teacher's passes that hold nothing."""
    supervised_rows: int = 0
    """Rows of the LM head."""
    masked_rows: int = 0
    """Visual tokens that the student does not see."""
    gram_pairs: int = 0
    """Sum over Gram matrices of the square of their side."""
    images: int = 0
    patches: int = 0
    """Rows of the vision tower, CLS tokens included."""
    patch_pairs: int = 0
    """(query, key) pairs of a tower layer that sees whole images."""
    window_pairs: int = 0
    """The same of a layer with windows."""

    def __add__(self, other: "StepWork") -> "StepWork":
        return StepWork.of(a + b for a, b in zip(astuple(self), astuple(other), strict=True))

    @classmethod
    def of(cls, numbers) -> "StepWork":
        """From numbers in the order of the fields, such as an all-reduced tensor's list."""
        return cls(**{name: int(value) for name, value in zip(WORK, numbers, strict=True)})

    @property
    def padding_share(self) -> float:
        """Share of the rows of student and teacher that hold nothing."""
        padding = self.student_padding + self.teacher_padding
        teacher = self.visual_tokens + self.teacher_padding if self.reconstruction_pairs else 0
        student = self.dialogue_rows + self.student_padding
        student += self.visual_tokens if self.reconstruction_pairs else 0
        return padding / max(1, student + teacher)


WORK = tuple(f.name for f in fields(StepWork))


def sequence_pairs(lengths: Sequence[int], image_lengths: Sequence[int], mixed: bool) -> int:
    """Pairs of documents of these lengths: causal, and the pairs from each image token to later ones of its image.

    Source: the mask of LaVer (arXiv 2512.06281); a causal document of n tokens has n (n + 1) / 2 pairs.
    """
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return pairs + (sum(n * (n - 1) // 2 for n in image_lengths) if mixed else 0)


def micro_batch_work(
    config: Config,
    *,
    document_lengths: Sequence[int],
    image_grids: Grids,
    student_rows: int,
    teacher_rows: int,
    supervised_rows: int,
    masked_rows: int,
) -> StepWork:
    """The work of one micro-batch.

    `image_grids` are (rows, columns) of visual tokens; `student_rows` and `teacher_rows` those of the passes, padding
    included (0 where there is no such pass).
    """
    mixed, again = config.attention.mixed_attention, config.objective.reconstructs
    lengths = [h * w for h, w in image_grids]
    tokens, visual = sum(document_lengths), sum(lengths)
    return StepWork(
        dialogue_rows=tokens,
        dialogue_pairs=sequence_pairs(document_lengths, lengths, mixed),
        visual_tokens=visual,
        reconstruction_pairs=sequence_pairs(lengths, lengths, mixed) if again else 0,
        student_padding=student_rows - tokens - (visual if again else 0),
        teacher_padding=teacher_rows - visual if teacher_rows else 0,
        supervised_rows=supervised_rows,
        masked_rows=masked_rows,
        gram_pairs=config.objective.gram_pairs(lengths),
        images=len(lengths),
        **_tower_work(tower_shape(config.vision), image_grids),
    )


def _tower_work(tower: TowerShape | None, grids: Grids) -> dict[str, int]:
    if tower is None:
        return {}
    merged = tower.merge**2
    patches = [h * w * merged + tower.prefix_tokens for h, w in grids]
    windows = 0
    if tower.window:
        windows = sum(_squares(h, tower.window) * _squares(w, tower.window) * merged**2 for h, w in grids)
    return dict(patches=sum(patches), patch_pairs=sum(n * n for n in patches), window_pairs=windows)


def _squares(side: int, window: int) -> int:
    """Sum of the squares of the pieces that windows cut a side into."""
    whole, rest = divmod(side, window)
    return whole * window**2 + rest**2
