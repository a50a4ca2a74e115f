"""Published preprocessor settings that pixels are compared under, and transformers' own answer to each."""

import io

import transformers
from PIL import Image, ImageOps

from laver_mcore.data.images.decode import to_rgb
from laver_mcore.data.images.native import NativeImageProcessor
from laver_mcore.data.images.processors import FixedImageProcessor

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def square(side):
    return {"height": side, "width": side}


CONFIGS = {
    # google/siglip-so400m-patch14-384: bicubic; google/siglip2-*: bilinear
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": square(384), "resample": 3, **HALF},
    "siglip2": {"image_processor_type": "SiglipImageProcessor", "size": square(384), "resample": 2, **HALF},
    # openai/clip-vit-large-patch14-336
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": square(336),
        "do_center_crop": True,
        "resample": 3,
        **CLIP,
    },
    # facebook/dinov2-base
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": square(224),
        "do_center_crop": True,
        "resample": 3,
        **IMAGENET,
    },
    # apple/aimv2-large-patch14-224
    "aimv2": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_size": square(224),
        "do_center_crop": True,
        "resample": 3,
        **CLIP,
    },
    # Qwen/Qwen2-VL-7B-Instruct
    "qwen2-vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "resample": 3,
        **CLIP,
    },
}
PROCESSORS = tuple(CONFIGS)


def build_processor(name):
    """Ours."""
    if name == "qwen2-vl":
        return NativeImageProcessor(CONFIGS[name])
    return FixedImageProcessor(CONFIGS[name], patch_size=14)


def reference_pixels(name, data):
    """Transformers', fed with what Pillow reads; 16 bits, which it clips to white, are scaled to 8 first."""
    config = CONFIGS[name] | {"do_convert_rgb": True}
    kind = config["image_processor_type"]
    processor = getattr(transformers, f"{kind}Pil").from_dict(config)
    with Image.open(io.BytesIO(data)) as image:
        shown = ImageOps.exif_transpose(image)
        picture = to_rgb(shown) if image.mode.startswith("I") else shown
    return processor([picture], return_tensors="pt")["pixel_values"]
