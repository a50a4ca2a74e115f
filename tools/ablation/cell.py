"""One cell of an ablation: train, look, answer, write its result; several one after another in one process."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from laver_mcore.cli.run import train_run
from laver_mcore.config.load import parse
from laver_mcore.config.schema import Config
from laver_mcore.data.images.decode import open_image
from laver_mcore.data.records.conversation import load_records
from laver_mcore.data.records.sample import Sample
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.demo.results import digit_scores
from laver_mcore.megatron import parallel
from laver_mcore.train.build import build_image_processor, build_tokenizer
from laver_mcore.train.engine import Engine
from laver_mcore.validation.answers import Reader, answer, questions_of
from tools.ablation.setting import ALIGN, RESULT, Cell, Setting
from tools.ablation.watch import Watch


def command(cell: Cell, setting: Setting, output: Path) -> list[str]:
    """The flags of pretrain_laver.py that train this cell."""
    data, task = output / "data" / cell.task, setting.tasks[cell.task]
    aligns = cell.arm == ALIGN
    flags = ["--config", setting.align if aligns else setting.train]
    flags += ["--data-path", str(data / ("align.json" if aligns else "train.json"))]
    flags += ["--tokenizer-model", str(data / "tokenizer.model"), "--save", str(output / cell.name)]
    flags += ["--seed", str(cell.seed), "--no-tensorboard"]
    flags += ["--no-exit-signal-handler"]  # a run that is told to stop would end well, and count as finished
    flags += [*setting.common, *(task.align if aligns else task.train), *setting.attention[cell.attention]]
    if cell.start is not None:
        flags += ["--pretrained-checkpoint", str(output / cell.start.name), *setting.arms[cell.arm].flags]
    return flags


def _held_out(config: Config, data: Path, count: int) -> tuple[list[Sample], Reader]:
    reader = Reader(
        tokenizer=build_tokenizer(config), processor=build_image_processor(config), max_new_tokens=20
    )
    return list(load_records(data / "heldout.json", data))[:count], reader


def _batch(samples: list[Sample], reader: Reader, config: Config) -> Batch:
    """First questions of held-out pages, packed into one row."""
    images = [open_image(sample.images[0]) for sample in samples]
    questions, keys = [sample.turns[0] for sample in samples], [sample.key for sample in samples]
    return reader.batch(questions, images, keys=keys, system_prompt=config.data.system_prompt)


def run_cell(cell: Cell, setting: Setting, output: Path) -> float:
    """Train one cell from nothing, in this process; returns its seconds."""
    started, folder = time.monotonic(), output / cell.name
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    config, _ = parse(command(cell, setting, output))
    samples, reader = _held_out(config, output / "data" / cell.task, setting.answer_pages)
    batch = _batch(samples[: setting.watch_pages], reader, config)
    device = parallel.init_distributed()
    try:
        engine = train_run(config, device, lambda engine: Watch(engine, batch, setting.watch_interval))
        result = _result(engine, samples, reader, folder) if cell.arm != ALIGN else {}
    finally:
        parallel.forget_groups()
    if cell.arm != ALIGN:  # nothing starts from it, and a hundred checkpoints are gigabytes
        for checkpoint in folder.glob("iter_*"):
            shutil.rmtree(checkpoint)
    seconds = time.monotonic() - started
    written = folder / f"{RESULT}.new"
    written.write_text(json.dumps({**result, "seconds": round(seconds, 1)}) + "\n", encoding="utf-8")
    written.rename(folder / RESULT)  # there only when whole: a cell that has it is finished
    return seconds


def _result(engine: Engine, samples: list[Sample], reader: Reader, folder: Path) -> dict[str, Any]:
    """Digits read right of every page, in order, and the digits on it."""
    answers = folder / "answers.jsonl"
    rows = answer(questions_of(samples), engine, reader)
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = digit_scores(answers)
    answers.unlink()
    return {
        "right": [right for right, _ in scores.values()],
        "total": [total for _, total in scores.values()],
    }
