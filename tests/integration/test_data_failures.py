"""A folder with damaged images trains to the end, in the same steps and with the same losses under every layout."""

import json

import pytest
from PIL import Image
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, read_metrics, run_scenarios

NUM_SAMPLES = 120
BROKEN = range(0, NUM_SAMPLES, 20)  # 5 %; every one has an image
LAYOUTS = {
    "plain": (),
    "tensor": ("--tensor-model-parallel-size", "2"),
    "pipeline": ("--pipeline-model-parallel-size", "2"),
    "workers": ("--num-workers", "1"),
    "torch": ("--image-backend", "torch_uint8"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    write_sample_data(folder, NUM_SAMPLES)
    recipe = write_recipe(folder)
    for number, index in enumerate(BROKEN):
        path = folder / f"{index:03d}_0.png"
        with Image.open(path) as image:
            assert image.size == (40, 40)
        # By turns behind the header, which only decoding finds, and whole, which the index finds.
        path.write_bytes(path.read_bytes()[:60] if number % 2 else b"<html>404</html>")
    argv = ("--config", str(recipe), "--train-iters", "14")
    run_scenarios(2, folder, [Scenario(name=name, argv=(*argv, *more)) for name, more in LAYOUTS.items()])
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_images_train_to_the_end(name, runs):
    rows = read_metrics(runs / name)
    assert [row["iteration"] for row in rows] == list(range(1, 15))
    listed = [json.loads(line) for line in (runs / name / "quarantine.jsonl").read_text().splitlines()]
    assert len({entry["sample"] for entry in listed}) == len(listed)
    reasons = " ".join(entry["reason"] for entry in listed)
    assert all(f"{index:03d}_0.png" in reasons for index in BROKEN)
    assert all(row["time_data_ms"] >= 0 for row in rows)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("plain", "torch")])
def test_every_layout_silences_the_same_samples(name, runs):
    for expected, got in zip(read_metrics(runs / "plain"), read_metrics(runs / name), strict=True):
        for loss in ("lm_loss", "mim_loss", "gram_loss"):
            assert got[loss] == pytest.approx(expected[loss], rel=2e-3), (got["iteration"], loss)


def test_too_many_bad_samples_stop_every_rank(tmp_path):
    """Data-parallel ranks stop at the same step with the same error, and both go on to the next run."""
    write_sample_data(tmp_path)
    recipe = write_recipe(tmp_path)
    for path in sorted(tmp_path.glob("*_0.png"))[::3]:
        path.write_bytes(path.read_bytes()[:60])  # only decoding finds out
    argv = ("--config", str(recipe), "--train-iters", "30")
    stopped = Scenario(name="stopped", argv=argv, may_fail=True)
    after = Scenario(name="after", argv=(*argv[:2], "--train-iters", "2", "--max-bad-fraction", "1.0"))
    run_scenarios(2, tmp_path, [stopped, after])
    error = (tmp_path / "stopped.error").read_text()
    assert "more than max_bad_fraction=0.1" in error
    assert 0 < len(read_metrics(tmp_path / "stopped")) < 30
    assert len(read_metrics(tmp_path / "after")) == 2
    listed = [json.loads(line) for line in (tmp_path / "stopped/quarantine.jsonl").read_text().splitlines()]
    assert len({entry["sample"] for entry in listed}) == len(listed) > 8
