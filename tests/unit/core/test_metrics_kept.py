"""Metrics of before are cut to where a run resumes, and never thrown away where it begins anew."""

import json

from laver_mcore.config.load import parse
from laver_mcore.train.metrics import Metrics

BASE = "--data-path x.json --tokenizer-model x.model --model tiny --vocab-size 96 --vision encoder-free"


def begin(run, iteration):
    Metrics(parse([*BASE.split(), "--no-tensorboard", "--save", str(run)])[0], iteration).close()
    return [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_past_the_resume_are_cut_and_a_torn_one_with_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"iter')
    assert begin(tmp_path, 2) == [1, 2]


def test_a_run_that_begins_anew_keeps_what_was_there(tmp_path):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": {number}}}\n')
        assert begin(tmp_path, 0) == []
    kept = [(tmp_path / f"metrics.before-{number}.jsonl").read_text() for number in (1, 2)]
    assert kept == ['{"iteration": 1}\n', '{"iteration": 2}\n']


def test_numbers_that_are_none_are_null(tmp_path, capsys):
    metrics = Metrics(parse([*BASE.split(), "--no-tensorboard", "--save", str(tmp_path)])[0], 0)
    row = {
        "iteration": 1,
        "loss": float("nan"),
        "grad_norm": float("inf"),
        "learning_rate": 1e-3,
        "skipped": 1,
    }
    metrics.write(row | {"tflops_per_gpu": 0.0}, 0.1)
    metrics.close()
    written = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert written["loss"] is None and written["grad_norm"] is None and written["learning_rate"] == 1e-3
