"""A wrong image folder leaves nothing behind: what an index depends on is in its key, and is looked at again."""

import shutil

import pytest
from corpora import encode, picture, write_llava

from laver_mcore.data.order import index as index_module
from laver_mcore.data.order.index import FOLDER, get_index
from laver_mcore.data.records.sources import open_source

LOST = "3.jpg"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Eight records with an image each, kept however few they are and however many are bad."""
    monkeypatch.setattr(index_module, "_CACHED_FROM", 5)
    monkeypatch.setattr(index_module, "_KEPT_BAD", 1.0)
    return write_llava(tmp_path, {f"{n}.jpg": encode(picture(20 + n, 30, seed=n)) for n in range(8)})


def indexed(corpus, tokenizer, folder, **settings):
    return get_index(open_source(corpus, folder, **settings), tokenizer, "", folder=corpus.parent / FOLDER)


def test_another_image_folder_is_another_index(corpus, hugging_face, tmp_path):
    nowhere = indexed(corpus, hugging_face, tmp_path / "nonexistent")
    assert len(nowhere.bad) == 8
    assert len(indexed(corpus, hugging_face, tmp_path).bad) == 0
    larger = tmp_path / "larger"
    larger.mkdir()
    for n in range(8):
        (larger / f"{n}.jpg").write_bytes(encode(picture(60, 40, seed=n)))
    assert indexed(corpus, hugging_face, larger).image_sizes.tolist() == [[60, 40]] * 8
    assert indexed(corpus, hugging_face, tmp_path).image_sizes.tolist() == [[20 + n, 30] for n in range(8)]


def test_what_may_lie_outside_is_part_of_the_key(corpus, hugging_face, tmp_path):
    for n in range(8):
        shutil.move(tmp_path / f"{n}.jpg", tmp_path.parent / f"{tmp_path.name}{n}.jpg")
        (tmp_path / f"{n}.jpg").symlink_to(tmp_path.parent / f"{tmp_path.name}{n}.jpg")
    refused = indexed(corpus, hugging_face, tmp_path / "absent")
    assert len(refused.bad) == 8
    assert len(indexed(corpus, hugging_face, tmp_path, allow_outside_images=True).bad) == 0


def test_an_image_that_comes_back_counts_again(corpus, hugging_face, tmp_path, monkeypatch):
    shutil.move(tmp_path / LOST, tmp_path / "aside")
    first = indexed(corpus, hugging_face, tmp_path)
    assert [kind for _, _, kind in first.bad] == ["image"]
    assert len(first) == len(indexed(corpus, hugging_face, tmp_path))  # still away: the index that is kept
    shutil.move(tmp_path / "aside", tmp_path / LOST)
    again = indexed(corpus, hugging_face, tmp_path)
    assert again.bad == () and len(again) == len(first) + 1
    monkeypatch.setattr(index_module, "_build", lambda *_: pytest.fail("measured once more"))
    assert len(indexed(corpus, hugging_face, tmp_path)) == len(again)
