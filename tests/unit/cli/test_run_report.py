"""A run as a page: its sums against arithmetic by hand, what it shows in a browser, and runs that are none."""

import json

import pytest
from browser import needs_browser, opened
from sample_run import write_recipe, write_sample_data

from laver_mcore.cli import report
from laver_mcore.config.load import parse, to_yaml

LINES = ((1, 3.0, 2.0, 10.0, 0.0), (3, 1.0, 4.0, 5.0, 0.5), (5, 2.0, 1.0, 40.0, 0.0))
ROWS = [
    {
        "iteration": iteration, "loss": loss, "lm_loss": loss, "visual_similarity": None, "skipped": iteration - 1,
        "step_seconds": seconds, "tokens_per_second": rate, "padding_share": padding,
        **{f"time_{part}_ms": 1000 * seconds / 7 for part in report._TIME},
    }
    for iteration, loss, seconds, rate, padding in LINES
]  # fmt: skip


def write_run(folder, rows=ROWS, *, recipe=False):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if recipe:
        write_sample_data(folder)
        config, _ = parse(
            ["--config", str(write_recipe(folder)), "--mask-ratio", "0.5", "--train-iters", "5"]
        )
        (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def test_sums_are_those_of_all_iterations():
    """Lines stand for 1, 2 and 2 iterations: 2 + 8 + 2 seconds, 20 + 40 + 80 tokens, padding 4 of 12 s x 0.5."""
    found = report.summary(ROWS)
    assert found["iterations"] == 5 and found["tokens"] == 140
    assert found["hours"] == pytest.approx(12 / 3600) and found["tokens/s"] == pytest.approx(140 / 12)
    assert found["padding"] == pytest.approx(8 * 0.5 / 12)
    assert (found["last loss"], found["lowest loss"], found["skipped steps"]) == (2.0, 1.0, 4)
    assert report.summary([ROWS[0] | {"loss": None}])["last loss"] == "none"
    assert report.summary([ROWS[0] | {"valid_accuracy": 0.5}, ROWS[1]])["best held-out accuracy"] == 0.5


def test_the_first_line_does_not_count_as_where_time_goes():
    (*_, table) = report.where_time_went([ROWS[0] | {"time_data_ms": 9e9}, *ROWS[1:]])
    assert table.count("0.1429") == 7  # a seventh each


@needs_browser
def test_a_browser_shows_curves_and_samples_with_masks(tmp_path):
    run, other = write_run(tmp_path / "mine", recipe=True), write_run(tmp_path / "<other>")
    (run / "quarantine.jsonl").write_text('{"key": "<broken>"}\n')
    assert report.main([str(run), str(other)]) == 0
    text = (run / "report.html").read_text()
    assert "http" not in text.replace("http://www.w3.org", "")
    (tmp_path / "opened").mkdir()
    found = opened(text, tmp_path / "opened")
    assert f"{run}, iteration 3: 1" in found and "&lt;other&gt;, iteration 5: 2" in found
    assert "visual_similarity" not in found  # has no number
    assert "1 samples left out" in found and "&lt;broken&gt;" in found
    assert "Step 4 (iteration 5)" in found and "tokens masked" in found and found.count("data:image/png") >= 1
    assert "Checkpoints: none; a resume takes none." in found


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "holds no metrics.jsonl (No such file or directory); give the --save folder of a run"),
        ("", "metrics.jsonl is empty: the run has not finished an iteration"),
        ('{"iteration"\n{"iteration": 2}\n', "metrics.jsonl, line 1 is no JSON"),
    ],
    ids=["no run", "no iteration", "broken"],
)
def test_what_is_no_run_is_one_line(written, said, tmp_path, capsys):
    if written is not None:
        (tmp_path / "metrics.jsonl").write_text(written)
    assert report.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(said) or said in line


def test_a_line_that_was_cut_off_and_data_that_are_gone_are_no_error(tmp_path):
    run = write_run(tmp_path / "run", recipe=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "lo')
    (run / "train.json").unlink()
    assert report.main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "What iteration 5 saw cannot be shown" in text and "train.json" in text


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as left:
        report.main([str(run), "--no-samples", "--output", str(tmp_path / "no" / "page.html")])
    assert left.value.code == 2
    assert "page.html: its folder does not exist" in capsys.readouterr().err
