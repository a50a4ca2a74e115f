"""The report from small invented runs: what it reads, what it says, what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from laver_mcore.demo.report import write_report
from laver_mcore.demo.results import read_answers, read_stage, spread


def write_run(folder, num_rows, laver):
    folder.mkdir(parents=True)
    rows = []
    for iteration in range(1, num_rows + 1):
        row = {
            "iteration": iteration,
            "loss": 2.0,
            "lm_loss": 2.0 / iteration,
            "learning_rate": 1e-3,
            "skipped": 0,
        }
        row |= {"mim_loss": None, "visual_similarity": 0.5}
        if laver:
            row |= {"mim_loss": 3.0, "gram_loss": 0.25, "mask_ratio": 0.1, "momentum": 0.96}
            row["teacher_distance"] = 1.5 if iteration % 2 == 0 else None
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def answers(tmp_path):
    rows = []
    for number in range(30):
        image = f"{number:02d}.jpg"
        Image.fromarray(np.full((48, 48, 3), 8 * number, np.uint8)).save(tmp_path / image)
        answer = "4 7 1" if number % 3 else "4 | 7"
        row = {"key": f"k{number}", "image": image, "question": "Which digits are in row 2, or in column 3?"}
        rows.append(json.dumps({**row, "expected": "4 7 1", "answer": answer}))
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def runs(tmp_path):
    alignment = write_run(tmp_path / "stage1", 30, False)
    return {
        "LaVer": [alignment, write_run(tmp_path / "stage2", 60, True)],
        "LM only": [alignment, write_run(tmp_path / "lm_only", 60, False)],
    }


def test_both_files_are_written(tmp_path, runs, answers):
    summary = {"accuracy": 0.853, "chance": 0.1, "lm_only_accuracy": 0.811, "seconds": 281.4}
    text_path, picture_path = write_report(tmp_path / "out", runs, answers, summary)
    text = text_path.read_text()
    assert "| LaVer | **85.3 %** |" in text
    assert "| LM only, equal steps | 81.1 % |" in text
    assert "| chance | 10.0 % |" in text
    assert "20 of 30 answers" in text
    assert "281 seconds" in text
    assert "| LaVer | stage2 | 60 | 0.03333 | 3 | 0.25 | 0.5 | 1.5 |" in text
    assert "| LM only | lm_only | 60 | 0.03333 | - | - | 0.5 | - |" in text
    assert "4 \\| 7 | wrong |" in text
    assert "(report.png)" in text
    with Image.open(picture_path) as picture:
        assert picture.width > 1200
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_one_plain_run_without_numbers_or_images_still_reports(tmp_path):
    run = write_run(tmp_path / "only", 1, False)
    answers = tmp_path / "answers.jsonl"
    row = {"key": "k", "image": "gone.jpg", "question": "What is it?", "expected": "a cat", "answer": ""}
    answers.write_text(json.dumps(row))
    text_path, picture_path = write_report(tmp_path / "out", {"run": [run]}, answers, {})
    assert "(nothing)" in text_path.read_text()
    assert picture_path.is_file()


def test_rows_without_a_metric_are_left_out_of_its_series(tmp_path):
    stage = read_stage(write_run(tmp_path / "stage", 5, True))
    assert stage.series("teacher_distance") == ([2, 4], [1.5, 1.5])
    assert stage.series("no such metric") == ([], [])
    assert stage.last_iteration == 5


def test_samples_are_spread_evenly(answers):
    everything = read_answers(answers)
    assert [answer.key for answer in spread(everything, 3)] == ["k0", "k10", "k20"]
    assert spread(everything, 99) == everything
    assert spread([], 3) == []


def test_a_cut_last_line_is_tolerated_and_a_broken_one_is_not(tmp_path):
    good = json.dumps({"iteration": 1, "lm_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text(good + '\n{"iteration": 2, "lm')
    assert read_stage(tmp_path).last_iteration == 1
    (tmp_path / "metrics.jsonl").write_text(good + "\n{oops\n" + good)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: broken JSON"):
        read_stage(tmp_path)


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_missing_metrics_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl: .*; give the --save folder"):
        read_stage(tmp_path)


def test_pictures_of_the_models_stand_between_curves_and_answers(tmp_path, runs, answers):
    folder = tmp_path / "out" / "diagnosis"
    summary = {"accuracy": 0.853, "masked": "Of 72 masked tokens, few."}
    pictures = {"Attention": folder / "attention.png", "Cosines": folder / "gram.png"}
    text = write_report(tmp_path / "out", runs, answers, summary, pictures)[0].read_text()
    shown = text[text.index("## What the models look at") : text.index("## Last values")]
    assert "Of 72 masked tokens, few." in shown
    assert "![Attention](diagnosis/attention.png)" in shown
    assert "![Cosines](diagnosis/gram.png)" in shown
    assert (
        "What the models look at" not in write_report(tmp_path / "out", runs, answers, summary)[0].read_text()
    )
