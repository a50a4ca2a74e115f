"""The two tasks with a sample that is lost, and images that cannot be read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpora import encode, picture

from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.wanted import WantedImage
from laver_mcore.data.sequence.prompt import IGNORE
from laver_mcore.data.serve.assemble import ImageTask, Readers, ReadImages, ReadTask, blank, decode_here

PAD = 7
OWNERS = (4, 4, 5, 6, 6)  # the samples that five images belong to


class Dialogues:
    """Three samples, read by number."""

    lengths = np.array([0, 0, 0, 0, 3, 2, 4])
    pad_id = PAD

    def key(self, number):
        return f"s{number}"

    def read(self, number):
        return f"read {number}"


def images(*bad):
    encoded = encode(picture(8, 6), "PNG")
    return tuple(
        WantedImage(LoadedImage(f"{n}.png", b"no image" if n in bad else encoded), 8, 6) for n in range(5)
    )


def one_number(wanted):
    """A backend that gives the number in the image's name."""
    failures = {
        i: f"{image.source} is bad" for i, image in enumerate(wanted) if image.source.data[:2] == b"no"
    }
    return torch.tensor([[float(str(image.source)[0])] for image in wanted]).reshape(-1, 1), failures


@pytest.fixture
def readers():
    return Readers(dialogues=Dialogues(), make_pixels=one_number)


def test_a_lost_sample_comes_out_blank_in_its_place(readers):
    touched = []
    texts = ReadTask(members=(4, 5, 6)).without(5, "it hangs").run(readers, touched.append)
    assert touched == [4, 5, 6]
    assert texts.samples[0] == "read 4" and texts.samples[2] == "read 6"
    assert texts.samples[1].key == "s5"
    assert texts.samples[1].encoded.token_ids_L.tolist() == [PAD] * 2
    assert texts.failures == {5: "it hangs"}


def test_a_blank_sample_is_as_long_and_teaches_nothing():
    sample = blank(Dialogues(), 6)
    assert sample.encoded.token_ids_L.tolist() == [PAD] * 4
    assert sample.encoded.labels_L.tolist() == [IGNORE] * 4
    assert sample.encoded.image_spans == sample.images == ()


def test_images_of_a_lost_sample_are_left_out_and_no_other(readers):
    task = ImageTask(images=images(), owners=OWNERS).without(4, "it hangs")
    assert task.owners == (5, 6, 6)
    pictures = task.run(readers, lambda number: None)
    assert pictures.pixels.ravel().tolist() == [2, 3, 4]
    assert pictures.failures == {4: "it hangs"}


@pytest.mark.parametrize(
    ("bad", "failures"),
    [
        ((), {}),
        ((0,), {4: "0.png is bad"}),
        ((2,), {5: "2.png is bad"}),
        ((1, 3, 4), {4: "1.png is bad", 6: "3.png is bad"}),  # of two of one sample, the first is named
    ],
    ids=["none", "first", "alone", "several"],
)
def test_bad_images_are_their_samples_fault(bad, failures, readers):
    touched = []
    pictures = ImageTask(images=images(*bad), owners=OWNERS).run(readers, touched.append)
    assert touched == list(OWNERS)
    assert pictures.failures == failures
    here = decode_here(ReadImages(images=images(*bad), failures={}), OWNERS, one_number)
    assert here.failures == failures
    assert pictures.pixels.ravel().tolist() == here.pixels.ravel().tolist() == [0, 1, 2, 3, 4]


def test_a_worker_that_only_reads_names_what_is_missing(tmp_path):
    (tmp_path / "there.png").write_bytes(b"bytes")
    wanted = tuple(WantedImage(tmp_path / name, 1, 1) for name in ("there.png", "gone.png"))
    only_reads = SimpleNamespace(make_pixels=None)
    pictures = ImageTask(images=wanted, owners=(1, 2)).run(only_reads, lambda number: None)
    assert pictures.failures.keys() == {2}
    assert "gone.png: cannot be read" in pictures.failures[2]
    assert [image.source.data for image in pictures.images] == [b"bytes", b""]
