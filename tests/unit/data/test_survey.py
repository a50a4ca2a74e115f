"""A set surveyed before it is trained on: what is counted, against a count by hand, and its page in a browser."""

import json
import re

import pytest
from browser import needs_browser, opened
from corpora import encode, picture
from sample_run import WORDS, write_tokenizer

from laver_mcore.cli import prepare
from laver_mcore.data.prepare.convert import ConvertOptions, open_corpus
from laver_mcore.data.prepare.survey import survey, thumbnail


def record(name, images, question, answer="blue"):
    turns = [
        {"from": "human", "value": "<image>\n" * len(images) + question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, "image": images, "conversations": turns}


@pytest.fixture
def folder(tmp_path):
    """Six good records (two of them the same), and six of four kinds of badness."""
    (tmp_path / "a.jpg").write_bytes(encode(picture(40, 30, seed=1)))
    (tmp_path / "same_as_a.jpg").write_bytes(encode(picture(40, 30, seed=1)))
    (tmp_path / "b.png").write_bytes(encode(picture(64, 16, seed=2), "PNG"))
    whole = encode(picture(200, 200, seed=3))
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "long.png").write_bytes(encode(picture(400, 1, seed=4), "PNG"))
    records = [
        record("text", [], "red"),
        record("one", ["a.jpg"], "red green"),
        record("again", ["same_as_a.jpg"], "red green"),
        record("two", ["a.jpg", "b.png"], "left"),
        record("b", ["b.png"], "<b>up</b>"),
        record("b2", ["b.png"], "down"),
        record("cut", ["cut.jpg"], "red"),
        record("cut2", ["cut.jpg"], "green"),
        record("long", ["long.png"], "red"),
        record("gone", ["<i>nowhere.jpg"], "red"),
        record("gone2", ["elsewhere.jpg"], "red"),
        {"id": "video", "video": "a.mp4", "conversations": record("", [], "x")["conversations"]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def found_in(folder, **changes):
    options = ConvertOptions(format="llava")
    source = open_corpus(folder / "data.json", None, options)
    return survey(source, limits=options.limits, **changes)


def test_what_is_counted(folder):
    found = found_in(folder, visual_tokens=lambda width, height: width * height)
    assert found.num_records == 12
    assert found.kinds == {"text alone": 1, "1 image": 4, "2 images": 1}
    assert sorted(found.sizes) == [(40, 30)] * 3 + [(64, 16)] * 3
    assert found.visual_tokens == [0, 1200, 1200, 2224, 1024, 1024]
    assert found.text_lengths[0] == len("redblue")
    assert sorted(found.images_seen.values()) == [3, 3]
    assert sorted(found.samples_seen.values()) == [1, 1, 1, 1, 2]
    assert len(found.thumbnails) == 2


def test_rejects_stand_together_by_reason(folder):
    found = found_in(folder)
    counts = sorted((reason.kind, reason.count, len(reason.pictures)) for reason in found.reasons.values())
    assert counts == [("image", 1, 1), ("image", 2, 0), ("image", 2, 2), ("video", 1, 0)]


def test_as_much_of_a_picture_as_can_be_decoded():
    whole = encode(picture(200, 200, seed=3))
    assert thumbnail(whole[: len(whole) // 2]).startswith(b"\xff\xd8")
    assert thumbnail(b"<html>") is None


def test_a_draw_is_the_conversions_own(folder):
    assert found_in(folder, num_samples=5, seed=1).num_records == 5


@needs_browser
def test_the_page_in_a_browser(folder, capsys):
    """By the command line: nothing is fetched, text of the data is text, pictures can be shown."""
    write_tokenizer(folder / "tokenizer.model", [" ".join(WORDS)] * 10)
    page = folder / "page.html"
    argv = f"--input {folder}/data.json --format llava --report {page} --tokenizer {folder}/tokenizer.model"
    assert prepare.main(argv.split()) == 0
    assert "12 records, 6 rejected" in capsys.readouterr().out
    text = page.read_text()
    assert "http" not in text
    assert "<i>nowhere" not in text
    script = (
        "<script>onload = () => document.title = "
        '[...document.images].map(i => i.naturalWidth > 0 ? "shown" : "broken").join(" ")</script>'
    )
    (folder / "opened").mkdir()
    dom = opened(text + script, folder / "opened")
    shown = re.search(r"<title>(.*?)</title>", dom)[1].split()
    assert shown == ["shown"] * 5  # three of rejects, two that repeat
    assert "tokens a sample" in dom
    assert "12 records: 6 samples, 6 rejected" in dom


# Command lines that make no sense -> words of the one line.
SENSELESS = {
    "neither": ("--input x --format llava", "--output, or --report"),
    "both": ("--input x --format llava --output o --report r.html", "--output, or --report"),
    "a tokenizer for nothing": ("--input x --format llava --output o --tokenizer t", "of the --report"),
}


@pytest.mark.parametrize(("flags", "words"), SENSELESS.values(), ids=SENSELESS)
def test_senseless_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as left:
        prepare.main(flags.split())
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_a_missing_folder_is_found_before_the_work(folder, capsys):
    argv = f"--input {folder}/data.json --format llava --report {folder}/nowhere/page.html"
    with pytest.raises(SystemExit):
        prepare.main(argv.split())
    assert "page.html: its folder does not exist" in capsys.readouterr().err


def test_visual_tokens_are_the_towers(tmp_path):
    config = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert prepare._visual_tokens(str(tmp_path))(99, 7) == 16
