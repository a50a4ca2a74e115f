"""Every image stands where its placeholder is, every patch where it is in the picture: the colours say so."""

import json

import pytest
import torch
from corpora import encode
from PIL import Image

from laver_mcore.data.images.backends import BACKENDS, make_backend
from laver_mcore.data.images.native import NativeImageProcessor
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.wanted import WantedImage
from laver_mcore.data.prepare.convert import ConvertOptions, convert, open_corpus
from laver_mcore.data.serve.loader import DialogueData

NUM_IMAGES = (2, 0, 3, 1, 4, 2)  # of sample 0, 1, ...
SIDE = 28  # pixels of a visual token
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
NATIVE = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": SIDE // 2,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": SIDE**2,
    "max_pixels": 100 * SIDE**2,
    "resample": 3,
    **HALF,
}
PROCESSORS = {
    "encoder-free": PatchImageProcessor(image_size=2 * SIDE, patch_size=SIDE),
    "native": NativeImageProcessor(NATIVE),
}
SIZES = {"global_batch_size": 2, "micro_batch_size": 2}


def colour(sample, image):
    """No two images of the set have the same."""
    return (30 * sample + 5, 50 * image + 7, 200)


def grid(sample, image):
    """(rows, columns) of visual tokens at native resolution: no two neighbours in a sample have the same."""
    return 1 + sample % 2, 1 + image


def plain(sample, image):
    rows, columns = grid(sample, image)
    return encode(Image.new("RGB", (columns * SIDE, rows * SIDE), colour(sample, image)), "PNG")


def record(sample):
    """Images in the first question; where there are three or more, the last one in the second question."""
    first = NUM_IMAGES[sample] - (NUM_IMAGES[sample] > 2)
    questions = ["<image>\n" * first + "which?", "<image>" * (NUM_IMAGES[sample] - first) + "and row 3?"]
    turns = []
    for question in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"They are {sample}."}]
    return {"id": f"s{sample}", "conversations": turns}


def write_json(folder):
    records = []
    for sample, num in enumerate(NUM_IMAGES):
        # Named against their order, so that whoever sorts them is found out.
        names = [f"{sample}_{num - image}.png" for image in range(num)]
        for image, name in enumerate(names):
            (folder / name).write_bytes(plain(sample, image))
        records.append(record(sample) | ({"images": names} if names else {}))
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def write_parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    images = [
        [{"bytes": plain(sample, image), "path": None} for image in range(num)]
        for sample, num in enumerate(NUM_IMAGES)
    ]
    rows = [record(sample) | {"images": of_sample} for sample, of_sample in enumerate(images)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=4)
    return folder / "train.parquet"


def write_shards(folder):
    options = ConvertOptions(format="llava", samples_per_shard=4)
    convert(open_corpus(write_json(folder), None, options), folder / "shards", options, num_workers=1)
    return folder / "shards"


FORMS = {"json": write_json, "parquet": write_parquet, "shards": write_shards}


@pytest.fixture(scope="module", params=FORMS)
def path(request, tmp_path_factory):
    return FORMS[request.param](tmp_path_factory.mktemp(request.param))


def colours(pixels):
    """The colour of each row of patches, which is the same all over the patch."""
    values = pixels.reshape(len(pixels), 3, -1) * 127.5 + 127.5
    assert (values.amax(-1) - values.amin(-1)).max() < 0.01
    return [tuple(row) for row in values.mean(-1).round().int().tolist()]


@pytest.mark.parametrize("num_shares", [1, 2, 3])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_every_image_stands_where_its_placeholder_is(kind, num_shares, path, hugging_face):
    data = DialogueData(
        path,
        tokenizer=hugging_face,
        image_processor=PROCESSORS[kind],
        seq_length=200,
        seed=3,
    )
    native = kind == "native"
    found = set()
    for step in range(data.rows_per_epoch(0) // 2 + 1):
        shares = [data.step_batches(step, **SIZES, image_share=(i, num_shares))[0] for i in range(num_shares)]
        batch, pixels = shares[0], torch.cat([share.pixels for share in shares])
        members = [
            int(data.samples.key(number)[1:]) for row in (2 * step, 2 * step + 1) for number in data.row(row)
        ]
        expected = [(sample, image) for sample in members for image in range(NUM_IMAGES[sample])]
        assert list(batch.image_keys) == [(f"s{sample}", image) for sample, image in expected]
        grids = [grid(sample, image) if native else (2, 2) for sample, image in expected]
        assert list(batch.image_grids) == grids
        rows = [  # at native resolution four patches are one visual token
            colour(*which)
            for which, (height, width) in zip(expected, grids, strict=True)
            for _ in range(height * width * (4 if native else 1))
        ]
        assert colours(pixels) == rows
        found |= set(expected)
    assert {sample for sample, _ in found} == {0, 2, 3, 4, 5}, (
        "choose steps that hold every sample with an image"
    )


def checkered(rows, columns):
    """A picture whose token (r, c) has the colour (20 r, 20 c, 0)."""
    image = Image.new("RGB", (columns * SIDE, rows * SIDE))
    for row in range(rows):
        for column in range(columns):
            image.paste((20 * row, 20 * column, 0), (column * SIDE, row * SIDE, *_end(row, column)))
    return image


def _end(row, column):
    return (column + 1) * SIDE, (row + 1) * SIDE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("processor", "sizes", "patches"),
    [
        (PatchImageProcessor(image_size=3 * SIDE, patch_size=SIDE), [(3, 3), (3, 3)], 1),
        (PROCESSORS["native"], [(2, 5), (4, 1), (3, 2)], 4),
    ],
    ids=["encoder-free", "native"],
)
def test_patches_come_row_by_row_image_by_image(processor, sizes, patches, backend):
    if backend.startswith("dali"):
        pytest.importorskip("nvidia.dali")
    images = [
        WantedImage(LoadedImage("x.png", encode(checkered(*size), "PNG")), size[1] * SIDE, size[0] * SIDE)
        for size in sizes
    ]
    pixels, failures = make_backend(backend, processor)(images)
    assert failures == {}
    rows = [
        (20 * row, 20 * column, 0)
        for height, width in sizes
        for row in range(height)
        for column in range(width)
        for _ in range(patches)
    ]
    assert colours(pixels) == rows


def test_positions_are_the_places_in_the_picture(tmp_path, hugging_face):
    """What the rotation is told of a visual token against what the tower is shown of it."""
    rows, columns = 3, 2
    checkered(rows, columns).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "why? <image> which?"}, {"from": "gpt", "value": "They are 1."}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    settings = {"tokenizer": hugging_face, "image_processor": PROCESSORS["native"], "seed": 0}
    data = DialogueData(tmp_path / "train.json", seq_length=128, **settings)
    (batch,) = data.step_batches(0, global_batch_size=1, micro_batch_size=1, image_share=(0, 1))
    shown = [(red // 20, green // 20) for red, green, _ in colours(batch.pixels)[::4]]
    first = int(batch.visual_rows_N[0])
    told = batch.layout.positions_3S[:, batch.visual_rows_N].T - first
    assert told.tolist() == [[0, *place] for place in shown]
    behind = batch.layout.positions_3S[:, first + rows * columns].tolist()
    assert behind == [first + max(rows, columns)] * 3
