"""What each arm's step contains, and the floating-point operations that follow, all from one account.

`useful` is what the arm's objective needs, the same for LaVer here and the released recipe; `executed` is what the
arm runs: here with padding and what attention's backward computes again, there three passes over whole padded
sequences with dense attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.work import StepWork, micro_batch_work
from laver_mcore.config.schema import Config, ObjectiveConfig
from laver_mcore.data.sequence.prompt import IGNORE
from laver_mcore.model.inputs import round_up
from tools.training_benchmark.batches import MicroBatch, global_batch, padded_length
from tools.training_benchmark.setting import Arm, Setting, engine_config, vocabulary


@dataclass(frozen=True, kw_only=True)
class Account:
    """Means over the global batches of a measurement, for one step of one arm."""

    dialogue_tokens: float
    images: float
    useful_flops: float
    executed_flops: float
    packed_rows: float
    """Rows of the language model's passes, padding included: student's and teacher's together."""


def account(arm: Arm, setting: Setting) -> Account:
    """The account of one step of `arm`."""
    config = engine_config(setting, laver=arm != "lm")
    vocab_size = vocabulary(config)
    batches = [global_batch(setting, vocab_size, number) for number in range(setting.num_batches)]
    work = sum((_engine_work(config, batch, setting) for batch in batches), StepWork())
    flops = step_flops(config, vocab_size, work)
    executed = flops.total.hardware
    rows = work.dialogue_rows + work.student_padding + work.teacher_padding
    rows += 2 * work.visual_tokens if arm != "lm" else 0
    if arm == "released":
        padded_rows, dense_pairs = _released_rows(batches)
        executed = _released_flops(config, vocab_size, work, padded_rows, dense_pairs)
        rows = 3 * padded_rows
    count = len(batches)
    return Account(
        dialogue_tokens=work.dialogue_rows / count,
        images=work.images / count,
        useful_flops=flops.total.model / count,
        executed_flops=executed / count,
        packed_rows=rows / count,
    )


def _engine_work(config: Config, batches: Sequence[MicroBatch], setting: Setting) -> StepWork:
    return sum((_micro_batch_work(config, batch, setting) for batch in batches), StepWork())


def _micro_batch_work(config: Config, batch: MicroBatch, setting: Setting) -> StepWork:
    grids = [(span.height, span.width) for sample in batch.samples for span in sample.image_spans]
    visual, multiple = sum(h * w for h, w in grids), config.data.pad_to_multiple
    reconstruction = round_up(visual, multiple) if config.objective.reconstructs else 0
    tokens = sum(len(sample) for sample in batch.samples)
    dialogue = min(setting.micro_batch_size * setting.seq_length, round_up(tokens, multiple))
    return micro_batch_work(
        config,
        document_lengths=[len(sample) for sample in batch.samples],
        image_grids=grids,
        student_rows=dialogue + reconstruction,
        teacher_rows=reconstruction,
        supervised_rows=sum(int((sample.labels_L != IGNORE).sum()) for sample in batch.samples),
        masked_rows=sum(int(h * w * config.objective.masked_share()) for h, w in grids),
    )


def _released_rows(batches: Sequence[Sequence[MicroBatch]]) -> tuple[int, int]:
    """Rows of one pass over the padded sequences, and the pairs of its dense attention."""
    shapes = [(len(b.samples), padded_length(b)) for batch in batches for b in batch]
    return sum(rows * length for rows, length in shapes), sum(rows * length**2 for rows, length in shapes)


def _released_flops(config: Config, vocab_size: int, work: StepWork, rows: int, pairs: int) -> float:
    """Two passes forward and backward and one forward over padded rows, logits of all rows in the first."""
    lm_only = replace(config, objective=ObjectiveConfig())
    frozen = replace(lm_only, train=replace(config.train, trainable=()))
    student = StepWork(dialogue_rows=2 * rows, dialogue_pairs=2 * pairs, supervised_rows=rows)
    teacher = StepWork(dialogue_rows=rows, dialogue_pairs=pairs)
    beside = step_flops(config, vocab_size, work).parts
    head = beside["vision_head"].hardware
    return (
        step_flops(lm_only, vocab_size, student).total.hardware
        + step_flops(frozen, vocab_size, teacher).total.hardware
        + beside["vision"].hardware
        + beside["connector"].hardware
        + head * (1 + 1 / 3)  # the teacher's is forward alone
        + beside["gram"].hardware * 2  # whole matrices and two products backward, where half is enough
    )
