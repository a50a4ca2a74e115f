"""Flags of tools/prepare_data.py, each handed on as what it says, and its exit status."""

from pathlib import Path

import pytest

from laver_mcore.cli import prepare
from laver_mcore.data.errors import DataError

FLAGS = (
    "--input in.json --format finevision --output out --image-folder pictures --workers 3 --samples-per-shard 4 "
    "--seed 5 --max-pixels 600 --max-aspect 7 --min-relevance 1 --min-visual-dependency 2 "
    "--min-image-correspondence 3 --min-formatting 4"
)


def test_every_flag_arrives(monkeypatch, capsys):
    seen = {}

    def open_corpus(*arguments, allow_outside_images):
        seen["opened"] = arguments
        assert not allow_outside_images
        return "source"

    def convert(*arguments, **more):
        seen["converted"] = (*arguments, more)
        return dict(
            num_samples=1200, num_images=34, shards=[1, 2], num_rejects=5, rejects_by_kind={"video": 5}
        )

    monkeypatch.setattr(prepare, "open_corpus", open_corpus)
    monkeypatch.setattr(prepare, "convert", convert)
    assert prepare.main(FLAGS.split()) == 0
    source, folder, options = seen["opened"]
    assert (source, folder) == (Path("in.json"), Path("pictures"))
    assert seen["converted"] == ("source", Path("out"), options, dict(num_workers=3, max_bad_fraction=0.1))
    assert (options.format, options.seed, options.samples_per_shard) == ("finevision", 5, 4)
    assert (options.limits.max_pixels, options.limits.max_aspect) == (600, 7)
    ratings = options.ratings
    kept = (ratings.relevance, ratings.visual_dependency, ratings.image_correspondence, ratings.formatting)
    assert kept == (1, 2, 3, 4)
    said = capsys.readouterr().out
    assert said.startswith("1,200 samples with 34 images in 2 shards; 5 rejected: 5 video (out")


@pytest.mark.parametrize(
    ("problems", "status"), [([], 0), (["a shard is broken"], 1)], ids=["in_order", "broken"]
)
def test_check(monkeypatch, capsys, problems, status):
    monkeypatch.setattr(prepare, "check_prepared", lambda folder, num_workers: problems)
    assert prepare.main(["--output", "out", "--check"]) == status
    assert capsys.readouterr().out.strip() == ("\n".join(problems) or "out: in order")


def test_bad_data_are_one_line(monkeypatch, capsys):
    def open_corpus(*_, **__):
        raise DataError("in.json: no such file")

    monkeypatch.setattr(prepare, "open_corpus", open_corpus)
    assert prepare.main(FLAGS.split()) == 1
    assert capsys.readouterr().err.endswith(": error: in.json: no such file\n")
