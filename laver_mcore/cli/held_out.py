"""The held-out data of a run, read and checked before anything is built or written."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from laver_mcore.config.schema import Config
from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.records.sample import Sample
from laver_mcore.data.sequence.tokenizer import Tokenizer
from laver_mcore.data.serve.exchange import connect
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.train.build import build_data, build_image_processor
from laver_mcore.train.engine import Engine
from laver_mcore.train.loop import Validation
from laver_mcore.validation.answers import Reader, questions_of
from laver_mcore.validation.probe import Probe
from laver_mcore.validation.validator import Validator


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out dialogues, packed for the loss, and the questions that are answered."""

    data: DialogueData
    questions: list[tuple[Sample, int]]
    reader: Reader

    def validations(self, engine: Engine, fingerprint: str) -> list[Validation]:
        """What a run with this engine asks of itself; all ranks call them together."""
        exchange = connect(engine.topology.replica_group)
        validator = Validator(
            engine=engine,
            data=self.data,
            exchange=exchange,
            questions=self.questions,
            reader=self.reader,
            fingerprint=fingerprint,
        )
        return [validator, Probe(engine=engine, data=self.data, exchange=exchange)]


def build_held_out(config: Config, tokenizer: Tokenizer, device: torch.device) -> HeldOut | None:
    """The recipe's held-out data, or None where it names none."""
    validation = config.validation
    if not validation.valid_data_path:
        return None
    folder = validation.valid_image_folder or config.data.image_folder
    shown = replace(
        config,
        data=replace(config.data, data_path=validation.valid_data_path, data_weights=(), image_folder=folder),
        run=replace(config.run, save=f"{config.run.save}/valid" if config.run.save else None),
    )
    questions = []
    if validation.eval_answers:
        for path in map(Path, validation.valid_data_path):
            questions += load_records(path, folder or path.parent)
    reader = Reader(
        tokenizer=tokenizer,
        processor=build_image_processor(config),
        max_new_tokens=validation.eval_answer_tokens,
    )
    return HeldOut(
        data=build_data(shown, tokenizer, device),
        questions=questions_of(questions[: validation.eval_answers]),
        reader=reader,
    )
