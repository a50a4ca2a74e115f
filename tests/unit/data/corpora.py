"""Small sets in the three published formats, and pictures that are hard to read."""

import io
import json

import numpy as np
from PIL import Image


def picture(width=40, height=30, seed=0, mode="RGB"):
    """A smooth picture with some noise, so that JPEG and resizing behave as on photographs."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [
        127
        + 90 * np.sin(rows / (7 + c) + seed) * np.cos(columns / (9 + 2 * c))
        + draw.normal(0, 9, rows.shape)
        for c in range(3)
    ]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image, kind="JPEG", **options):
    """The bytes of a picture."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(orientation, seed=0):
    """A JPEG whose EXIF asks for a rotation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(seed=seed), exif=exif)


def sixteen_bits():
    """A grey PNG of 16 bits."""
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    return encode(Image.fromarray(values), "PNG")


def hard_pictures():
    """Name -> encoded bytes of everything that readers are known to disagree about."""
    alpha = picture(mode="RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))))
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "rgb.jpg": encode(picture(61, 45)),
        "progressive.jpg": encode(picture(61, 45), progressive=True),
        "exif.jpg": rotated(6),
        "cmyk.jpg": encode(picture(mode="CMYK")),
        "grey.jpg": encode(picture(mode="L")),
        "rgb.png": encode(picture(), "PNG"),
        "grey.png": encode(picture(mode="L"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "transparent_palette.png": encode(palette, "PNG", transparency=3),
        "alpha.png": encode(alpha, "PNG"),
        "sixteen.png": sixteen_bits(),
        "gif.gif": encode(palette, "GIF"),
        "webp.webp": encode(picture(), "WEBP", quality=90),
        "tall.jpg": encode(picture(24, 400)),
        "wide.jpg": encode(picture(400, 24)),
    }


def write_llava(folder, pictures, num_text_only=2):
    """LLaVA-Pretrain's form: train.json and files."""
    records = []
    for number, (name, data) in enumerate(pictures.items()):
        (folder / name).write_bytes(data)
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": f"row {number}"}]
        records.append({"id": f"s{number}", "image": name, "conversations": turns})
    for number in range(num_text_only):
        turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": f"They are {number}."}]
        records.append({"id": f"t{number}", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def write_onevision(path, num_rows=12, row_group_size=5):
    """LLaVA-OneVision's form: every third row is text alone, some lack the placeholder."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = []
    for number in range(num_rows):
        with_image = number % 3 != 2
        question = "<image>\nwhich?" if number % 3 == 0 else "which?"
        image = {"bytes": encode(picture(seed=number)), "path": f"{number}.jpg"} if with_image else None
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"row {number}"}]
        rows.append({"id": f"r{number}", "image": image, "conversations": turns, "data_source": "cauldron"})
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def write_finevision(path, num_rows=9, row_group_size=4):
    """FineVision's form: 0 to 2 images, two turns, per-turn ratings; turn 1 of row n is rated n % 5 + 1."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = []
    for number in range(num_rows):
        images = [{"bytes": encode(picture(seed=9 * number + i)), "path": None} for i in range(number % 3)]
        texts = [
            {"user": "write <image> in plain text", "assistant": f"row {number}"},
            {"user": "which?", "assistant": "They are 7."},
        ]
        ratings = {"relevance_ratings": [5, number % 5 + 1], "relevance_min": min(5, number % 5 + 1)}
        rows.append({"images": images, "texts": texts, "source": "docvqa", **ratings})
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path
