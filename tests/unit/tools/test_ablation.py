"""The ablation: its cells, its statistics against their definitions, its words, and a toy one from end to end."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from long import LONG

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse
from tools.ablation import summary
from tools.ablation.cell import command
from tools.ablation.conclusion import FINDINGS, verdict
from tools.ablation.setting import ALIGN, RESULT, cells_of, load
from tools.ablation.watch import less_alike

ROOT = Path(__file__).resolve().parents[3]
RESULTS = sorted((ROOT / "tools/ablation/results").glob("*.jsonl.gz"))
SETTINGS = sorted((ROOT / "tools/ablation").glob("*.yaml"))
CPU = ROOT / "tools/ablation/cpu.yaml"
LM_ALONE = (ALIGN, "lm", "mixed", "rope_2d", "both", "both_contiguous")


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_every_cell_is_a_recipe_that_can_train(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    setting = load(path)
    assert len(setting.seeds) >= 5
    for cell in cells_of(load(path, seeds=[3])):
        config, _ = parse(command(cell, setting, Path("runs/ablation")))
        assert config.train.seed == 3
        assert not config.run.exit_signal_handler
        assert (config.objective.name == "lm") == (cell.arm in LM_ALONE)
        assert config.attention.mixed_attention == ("mixed" in cell.attention)
        assert config.attention.rope_2d == ("2d" in cell.attention)


def test_each_cell_comes_after_its_start_and_whole_seeds_first():
    cells = cells_of(load(CPU))
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for place, cell in enumerate(cells):
        assert cell.start is None or cell.start.name in names[:place]
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.task for cell in cells if cell.arm == "mask_low"} == {"demo"}


def test_every_finding_is_compared():
    arms = load(CPU).arms
    assert all(against in arms[arm].against for arm, against, *_ in FINDINGS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": {"a": {"title": "A", "attention": "none"}}}, "'none'; it may be full"),
        ({"arms": {"a": {"title": "A", "attention": "full", "against": ["b"]}}}, "'b'; it may be a"),
        ({"tasks": None}, "no setting of an ablation"),
        ({"arms": {"a": {"title": "A", "attention": "full", "colour": "red"}}}, "colour"),
    ],
    ids=["attention", "against", "no tasks", "unknown key"],
)
def test_a_bad_setting_is_one_line(change, said, tmp_path):
    good = dict(align="a", train="b", seeds=[1], tasks={"t": {}}, attention={"full": []}, arms={})
    (tmp_path / "setting.yaml").write_text(yaml.safe_dump(good | change))
    with pytest.raises(ConfigError, match=said) as caught:
        load(tmp_path / "setting.yaml")
    assert "\n" not in str(caught.value)


def test_paired_is_students_test():
    ours, theirs = [0.9, 0.7, 0.8, 0.95], [0.8, 0.72, 0.7, 0.9]
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / 4
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 3 / 4)
    found = summary.paired(ours, theirs)
    quantile = 3.182446305  # of Student's t with 3 degrees of freedom at 0.975, from a printed table
    assert found["mean"] == pytest.approx(mean)
    assert [found["low"], found["high"]] == pytest.approx([mean - quantile * error, mean + quantile * error])
    assert (found["p"] < 0.05) == (found["low"] > 0)
    assert summary.paired([0.5], [0.25]) == {"mean": 0.25, "low": None, "high": None, "p": None, "pairs": 1}


def test_holm():
    """The worked example of Holm (1979): 0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02."""
    found = summary.holm([0.01, 0.04, None, 0.03, 0.005])
    assert found[2] is None
    assert found[:2] + found[3:] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_less_alike_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 5, generator=generator) for _ in range(2))
    shares = []
    for start, stop in ((0, 3), (3, 7)):
        below = [
            F.cosine_similarity(student[a], student[b], dim=0)
            < F.cosine_similarity(teacher[a], teacher[b], dim=0)
            for a in range(start, stop)
            for b in range(start, stop)
            if a != b
        ]
        shares.append(sum(map(float, below)) / len(below))
    assert less_alike(student, teacher, (3, 4)) == pytest.approx(sum(shares) / 2)
    assert less_alike(student, student, (3, 4)) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "sign", "said"),
    [
        (0.01, 0.03, 1, "holds"),
        (-0.01, 0.03, 1, "is not shown"),
        (-0.03, -0.01, 1, "is contradicted"),
        (-0.03, -0.01, -1, "holds"),
        (None, None, 1, "is not tested"),
    ],
)
def test_verdict(low, high, sign, said):
    mean = 0.01 if low is None else (low + high) / 2
    assert verdict({"mean": mean, "low": low, "high": high}, sign) == said


def write_cells(output, setting, accuracy):
    """Finished cells with so many of ten digits right on each page of (arm, seed), and a similarity to match."""
    for cell in cells_of(setting, tasks=["demo"], arms=list(accuracy)):
        if cell.arm == ALIGN:
            continue
        folder = output / cell.name
        folder.mkdir(parents=True)
        right = [accuracy[cell.arm] + cell.seed % 2, accuracy[cell.arm]]
        (folder / RESULT).write_text(json.dumps({"right": right, "total": [10, 10], "seconds": 2.0}))
        row = {"similarity_1": 0.5, "rank_1": 3.0, "similarity_2": right[0] / 10, "rank_2": 2.0}
        rows = [{"iteration": 25, **row}, {"iteration": 50, **row}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_summary_of_what_is_finished(tmp_path):
    setting = load(CPU)
    write_cells(tmp_path, setting, {"both": 4, "mim": 6})
    text = summary.write(setting, tmp_path, summary.collect(setting, tmp_path))
    found = json.loads((tmp_path / "summary.json").read_text())
    assert set(found) == {"demo"}
    accuracies = [0.45, 0.4, 0.45, 0.4, 0.45]
    assert found["demo"]["arms"]["both"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert found["demo"]["arms"]["both"]["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    (only,) = found["demo"]["comparisons"]
    assert (only["arm"], only["against"]) == ("mim", "both")
    assert only["accuracy_over_seeds"]["mean"] == pytest.approx(0.2)
    assert only["accuracy_over_seeds"]["pairs"] == 5
    assert only["accuracy_over_pages"]["pairs"] == 2
    assert "*Masked reconstruction alone helps* is not tested" not in text
    assert "| + MIM | LM + mixed + 2D-RoPE | +20.0" in text


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{")], ids=["text", "no JSON"])
def test_metrics_that_are_none_are_one_line(content, tmp_path):
    (tmp_path / "metrics.jsonl.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is no metrics\.jsonl\.gz"):
        summary.read(tmp_path / "metrics.jsonl.gz")


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.name)
def test_the_documentation_shows_what_the_metrics_say(results, tmp_path):
    """Every table and every sentence of docs/evidence.md on a committed run comes from its metrics."""
    text = summary.write(load(CPU), tmp_path, summary.read(results))
    assert text.strip() in (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    assert summary.read(tmp_path / "metrics.jsonl.gz") == summary.read(results)


TOY = """
align: examples/demo/stage1.yaml
train: examples/demo/stage2.yaml
seeds: [1, 2]
watch_interval: 1
watch_pages: 2
answer_pages: 2
common: [--train-iters, 2, --lr-warmup-iters, 1, --micro-batch-size, 1, --global-batch-size, 1]
tasks:
  tiny: {prepare: [--pages, 24, --heldout, 4]}
attention:
  mixed_2d: []
arms:
  both: {title: LM, attention: mixed_2d, flags: [--objective, lm, --trainable, connector.*, language_model.*]}
  cga: {title: CGA, attention: mixed_2d, against: [both]}
"""


@LONG
def test_toy_ablation(tmp_path):
    """From one command to a summary; once more it trains nothing and writes the same."""
    (tmp_path / "toy.yaml").write_text(TOY)
    tool = [
        sys.executable,
        "tools/reproduce_ablation.py",
        "--setting",
        tmp_path / "toy.yaml",
        "--output",
        tmp_path,
    ]
    runs = [subprocess.run(tool, cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert "6 cells, 0 of them finished" in runs[0].stdout
    assert "6 cells, 6 of them finished" in runs[1].stdout
    arms = json.loads((tmp_path / "summary.json").read_text())["tiny"]["arms"]
    assert arms["cga"]["seeds"] == [1, 2]
    assert arms["cga"]["iterations"] == [1, 2]
    assert len(arms["cga"]["over_training"]["less_alike"]) == 2
    assert len(arms["both"]["similarity_by_layer"]) == 4
    assert "less_alike" not in arms["both"]["over_training"]
    assert runs[1].stdout.endswith((tmp_path / "conclusion.md").read_text() + "\n")
