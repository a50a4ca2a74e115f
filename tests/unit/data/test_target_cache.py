"""Features that are kept: the same bits come back by an image's hash, and what is not there is said."""

import json
import pickle

import pytest
import torch
from corpora import encode, picture

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.target_cache import TargetCache, TargetCacheWriter, image_key
from laver_mcore.data.images.wanted import WantedImage

ABOUT = dict(kind="dinov2", view="whole", grid=[2, 3], width=4)
FILES = [encode(picture(seed=seed)) for seed in range(7)]


def wanted(data, name="picture"):
    return WantedImage(LoadedImage(name, data), 40, 30)


def features(number):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number))


def write(folder, numbers, **settings):
    writer = TargetCacheWriter(folder, ABOUT, images_per_file=3, **settings)
    for number in numbers:
        writer.add(image_key(FILES[number]), features(number))
    writer.close()
    return writer


def read(folder, numbers):
    found, failures = TargetCache(folder)([wanted(FILES[number]) for number in numbers])
    assert failures == {}
    return found.view(torch.bfloat16)


def test_the_same_bits_come_back_in_any_order(tmp_path):
    write(tmp_path, range(7))
    order = [5, 0, 6, 3, 3, 1]
    assert torch.equal(read(tmp_path, order), torch.stack([features(n).bfloat16() for n in order]))
    assert len(list(tmp_path.glob("features-*.safetensors"))) == 3
    cache = TargetCache(tmp_path)
    assert cache.grid == (2, 3) and cache.width == 4
    empty, failures = cache([])
    assert empty.shape == (0, 6, 4) and failures == {}


def test_a_second_writer_goes_on_and_parts_stand_beside_each_other(tmp_path):
    write(tmp_path, (0, 1))
    writer = write(tmp_path, (2, 3))
    assert writer.present == {image_key(FILES[n]) for n in range(4)}
    write(tmp_path, (4, 5, 6), part=1)
    assert torch.equal(read(tmp_path, range(7)), torch.stack([features(n).bfloat16() for n in range(7)]))


def test_an_image_that_is_not_there_is_named(tmp_path):
    write(tmp_path, (0, 1))
    found, failures = TargetCache(tmp_path)([wanted(FILES[0]), wanted(FILES[4], "b.jpg"), wanted(FILES[1])])
    assert list(failures) == [1]
    assert failures[1].startswith("b.jpg: not in ") and "laver prepare-targets" in failures[1]
    assert not found[1].any() and found[0].any() and found[2].any()


def test_half_of_a_hash_is_not_enough(tmp_path):
    key = image_key(FILES[0])
    writer = TargetCacheWriter(tmp_path, ABOUT)
    writer.add((key[0], key[1] ^ 1), features(0))
    writer.close()
    assert TargetCache(tmp_path)([wanted(FILES[0])])[1].keys() == {0}


def test_workers_get_it_without_its_index(tmp_path):
    write(tmp_path, range(7))
    cache = TargetCache(tmp_path)
    cache([wanted(FILES[2])])
    data = pickle.dumps(cache)
    assert len(data) < 1500
    assert torch.equal(
        pickle.loads(data)([wanted(FILES[2])])[0][0].view(torch.bfloat16), features(2).bfloat16()
    )


def test_a_cache_of_something_else_is_refused(tmp_path):
    write(tmp_path, (0,))
    with pytest.raises(DataError, match="holds kind='dinov2', wanted 'sam'"):
        TargetCacheWriter(tmp_path, ABOUT | {"kind": "sam"})
    with pytest.raises(DataError, match="holds view='whole', wanted 'the middle'"):
        TargetCache(tmp_path).check(kind="dinov2", view="the middle")
    TargetCache(tmp_path).check(kind="dinov2", view="whole")


BROKEN = {
    "missing": (None, "no cache.json there"),
    "json": ("{", "broken"),
    "list": ("[]", "broken"),
    "null": ("null", "broken"),
    "grid": (json.dumps(ABOUT | {"grid": [2]}), "broken"),
    "grid_zero": (json.dumps(ABOUT | {"grid": [0, 2]}), "must be positive"),
    "grid_text": (json.dumps(ABOUT | {"grid": "ab"}), "broken"),
    "width": (json.dumps(ABOUT | {"width": None}), "broken"),
    "no_width": (json.dumps({"grid": [2, 3]}), "broken"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_folder_that_is_no_cache_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "cache.json").write_text(text)
    with pytest.raises(DataError, match=message):
        TargetCache(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_damaged_file_is_named(tmp_path, keep):
    write(tmp_path, (0, 1))
    (file,) = tmp_path.glob("features-*")
    file.write_bytes(file.read_bytes()[:keep])
    _, failures = TargetCache(tmp_path)([wanted(FILES[0])])
    assert "cannot be read" in failures[0] and file.name in failures[0]
    with pytest.raises(DataError, match="delete it and make it again"):
        TargetCacheWriter(tmp_path, ABOUT)
