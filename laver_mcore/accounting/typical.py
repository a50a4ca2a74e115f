"""A typical micro-batch, for predictions before any data is there."""

from dataclasses import dataclass

from laver_mcore.accounting.work import StepWork, micro_batch_work
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config
from laver_mcore.shapes.towers import tower_shape

VISUAL_SHARE = 0.7
"""Share of a packed row that is visual tokens, where nothing else is said: two images of 729 in 2,048 tokens."""
NATIVE_GRID = (27, 27)
"""Visual tokens of an image at native resolution, where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a packed row holds: dialogues of one image each, of equal length, without padding."""

    images_per_row: int
    grid: tuple[int, int]
    supervised_share: float
    """Share of all rows of the dialogue that the LM head runs on."""

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one image."""
        return self.grid[0] * self.grid[1]


def typical_mix(config: Config, images_per_row: int | None = None, supervised_share: float = 0.29) -> Mix:
    """The mix of a recipe; `ConfigError` for more images than a row holds."""
    seq_length, vision = config.data.seq_length, config.vision
    if not vision.has_images:
        return Mix(images_per_row=0, grid=(1, 1), supervised_share=supervised_share)
    grid, tower = NATIVE_GRID, tower_shape(vision)
    if vision.is_encoder_free:
        grid = (vision.image_size // vision.patch_size,) * 2
    elif tower is not None and tower.fixed_tokens is not None:
        grid = (round(tower.fixed_tokens**0.5),) * 2
    tokens = grid[0] * grid[1]
    if images_per_row is None:
        images_per_row = min(max(1, round(VISUAL_SHARE * seq_length / tokens)), seq_length // tokens)
    if images_per_row * tokens > seq_length:
        raise ConfigError(
            f"{images_per_row} images of {tokens} visual tokens do not fit into seq_length={seq_length}; "
            f"use at most {seq_length // tokens}"
        )
    return Mix(images_per_row=images_per_row, grid=grid, supervised_share=supervised_share)


def typical_work(config: Config, mix: Mix) -> StepWork:
    """Work of one micro-batch of `train.micro_batch_size` such rows."""
    rows, seq_length, pad = config.train.micro_batch_size, config.data.seq_length, config.data.pad_to_multiple
    documents = max(1, mix.images_per_row)
    lengths = [seq_length // documents + (i < seq_length % documents) for i in range(documents)]
    images = rows * mix.images_per_row
    visual = images * mix.image_tokens
    reconstruction = -(-visual // pad) * pad if config.objective.reconstructs else 0
    text = rows * seq_length - visual
    return micro_batch_work(
        config,
        document_lengths=lengths * rows,
        image_grids=[mix.grid] * images,
        student_rows=rows * seq_length + reconstruction,
        teacher_rows=reconstruction if config.objective.teacher(config) else 0,
        supervised_rows=min(text, round(mix.supervised_share * rows * seq_length)),
        masked_rows=round(config.objective.masked_share() * visual),
    )
