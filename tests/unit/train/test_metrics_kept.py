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
    metrics.write(row | {"tflops_per_gpu": 0.0, "tokens_per_second": 10.0}, 0.1)
    metrics.close()
    written = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert written["loss"] is None and written["grad_norm"] is None and written["learning_rate"] == 1e-3


def test_the_summary_counts_iterations_and_not_lines(tmp_path, capsys):
    """Lines of 2 and of 3 iterations: 2 x 1 s x 10 + 3 x 2 s x 5 tokens in 8 s; a loss that is none does not count."""
    metrics = Metrics(parse([*BASE.split(), "--no-tensorboard", "--save", str(tmp_path)])[0], 0)
    row = {"grad_norm": 1.0, "learning_rate": 1e-3, "skipped": 0, "tflops_per_gpu": 0.0}
    metrics.write(row | {"iteration": 2, "loss": 1.0, "tokens_per_second": 10.0}, 1.0)
    metrics.write(row | {"iteration": 5, "loss": 2.0, "tokens_per_second": 5.0}, 2.0)
    metrics.write(row | {"iteration": 6, "loss": float("nan"), "tokens_per_second": 0.0}, 0.0)
    assert metrics.summary() == [
        "50 tokens at 6 a second, checkpoints and validation aside",
        "loss 2.0000 at the end, 1.0000 at its lowest (iteration 2)",
        f"every iteration's numbers: {tmp_path}/metrics.jsonl",
    ]
    metrics.close()
