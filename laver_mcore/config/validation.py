"""Section of a recipe that says what is looked at beside training, on data that is not trained on."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out dialogues, how often a run looks at them, and what it keeps of that."""

    valid_data_path: tuple[str, ...] = ()
    """Held-out sets, in any format of data_path; none: the run does not validate."""
    valid_image_folder: str | None = None
    """Folder that their image paths are relative to; data.image_folder where not given."""
    eval_interval: int = 1000
    """Iterations between validations; one is always made at the end."""
    eval_iters: int = 10
    """Steps of global_batch_size rows that the validation loss is taken over; at most the held-out sets once."""
    eval_answers: int = 0
    """Held-out dialogues whose questions are answered greedily, for their accuracy; 0 answers none."""
    eval_answer_tokens: int = 32
    """Longest such answer."""
    probe_interval: int | None = None
    """Iterations between probes of every layer on the first step of held-out rows: similarity and effective rank of an
    image's tokens, the answers' attention on them; none are made where not given."""
    save_best: Literal["valid_lm_loss", "valid_accuracy"] | None = None
    """Keep the checkpoint that is best by this beside the others, in DIR/best: --load and tools take that folder."""
