"""How many bad samples stop a run: at the bound, by the index and during the run, each counted once."""

import json

import pytest

from laver_mcore.data.errors import DataError
from laver_mcore.data.serve.quarantine import Quarantine

# Allowed fraction, bad samples, all samples -> whether the index refuses the set.
INDEX = {
    "none allowed, none bad": (0.0, 0, 10, False),
    "none allowed, one bad": (0.0, 1, 10, True),
    "at the bound": (0.1, 2, 20, False),
    "one above": (0.1, 3, 20, True),
    "half a sample below": (0.1, 1, 15, False),
    "half a sample above": (0.1, 2, 15, True),
    "a bound that binary rounds down": (0.29, 29, 100, False),  # 0.29 * 100 is 28.999999999999996
    "one above a bound that binary rounds up": (0.07, 8, 100, True),  # 0.07 * 100 is 7.000000000000001
    "all allowed": (1.0, 10, 10, False),
}

# Allowed fraction, what the index left out, samples that fail, samples read -> whether the run stops.
RUN = {
    "eight are forgiven": (0.0, 0, 8, 8, False),
    "nine are not": (0.0, 0, 9, 9, True),
    "at the bound": (0.1, 0, 9, 90, False),
    "just above the bound": (0.1, 0, 9, 89, True),
    "at a larger bound": (0.1, 0, 12, 120, False),
    "above a larger bound": (0.1, 0, 13, 120, True),
    "what the index left out is not counted again": (0.1, 50, 1, 10, False),
    "nor added to what fails": (0.1, 3, 9, 90, False),
}


def bad(num, name="record"):
    return [(f"{name} {n}", "cannot be decoded", "image") for n in range(num)]


@pytest.mark.parametrize(("fraction", "num_bad", "total", "refused"), INDEX.values(), ids=INDEX)
def test_bad_samples_of_an_index(fraction, num_bad, total, refused):
    quarantine = Quarantine(None, fraction)
    if refused:
        message = f"{num_bad} of {total} samples are bad, more than max_bad_fraction={fraction}"
        with pytest.raises(DataError, match=message):
            quarantine.add_unusable(bad(num_bad), total)
    else:
        quarantine.add_unusable(bad(num_bad), total)
        assert len(quarantine) == num_bad


@pytest.mark.parametrize(("fraction", "unusable", "num_bad", "seen", "stops"), RUN.values(), ids=RUN)
def test_failures_during_a_run(fraction, unusable, num_bad, seen, stops):
    quarantine = Quarantine(None, fraction)
    quarantine.add_unusable(bad(unusable), 1000)
    quarantine.saw(seen)
    for key, reason, _ in bad(num_bad, "sample"):
        quarantine.add_failure(key, reason, write=True)
    if stops:
        with pytest.raises(DataError, match=f"{num_bad} of {seen} samples are bad"):
            quarantine.check()
    else:
        quarantine.check()


def test_a_sample_that_fails_in_every_epoch_counts_once(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.0)
    for _ in range(9):
        quarantine.saw(1)
        quarantine.add_failure("sample 1", "cannot be decoded", write=True)
        quarantine.check()  # nine would stop it
    assert len(quarantine) == 1
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"sample": "sample 1", "reason": "cannot be decoded"}


def test_samples_are_counted_over_all_steps():
    quarantine = Quarantine(None, 0.1)
    for step in range(3):
        quarantine.saw(30)
        for key, reason, _ in bad(3, f"step {step}, sample"):
            quarantine.add_failure(key, reason, write=False)
        quarantine.check()  # 9 of 90 in the end


@pytest.mark.parametrize(("rank", "num_lines"), [(None, 2), ("0", 2), ("1", 0)])
def test_one_rank_lists_what_the_index_left_out(rank, num_lines, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 0.5).add_unusable(bad(2), 10)
    assert (len(path.read_text().splitlines()) if path.exists() else 0) == num_lines


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_one(fraction):
    with pytest.raises(DataError, match="is not between 0 and 1"):
        Quarantine(None, fraction)
