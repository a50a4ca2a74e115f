"""Native towers equal transformers' own forward, image by image, and read their published file layouts."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from laver_mcore.config.towers import tower_named
from laver_mcore.data.images.native import native_processor
from laver_mcore.model.native_encoders import build_native_encoder

QWEN = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
CONFIGS = {
    "qwen2-vl": dict(model_type="qwen2_vl", vision_config=dict(embed_dim=32, hidden_size=48, **QWEN)),
    "qwen2.5-vl": dict(
        model_type="qwen2_5_vl",
        vision_config=dict(
            hidden_size=32,
            out_hidden_size=48,
            intermediate_size=40,
            window_size=16,
            fullatt_block_indexes=[1],
            **QWEN,
        ),
    ),
    "aimv2": dict(
        model_type="aimv2_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=4,
        image_size=32,
        is_native=True,
        use_head=True,
    ),
}


def write_directory(path, kind):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[kind]))
    processor = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], min_pixels=64, max_pixels=4096)
    if kind == "aimv2":
        processor["image_processor_type"] = "CLIPImageProcessor"
    else:
        processor |= dict(image_processor_type="Qwen2VLImageProcessor", patch_size=4, merge_size=2)
        processor["temporal_patch_size"] = 2
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def images():
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        for size in ((24, 40), (17, 9))
    ]
    return [Image.fromarray(each.numpy()) for each in noise]


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def test_packed_images_equal_transformers_one_by_one(tmp_path, kind):
    path = write_directory(tmp_path / "tower", kind)
    encoder = build_native_encoder(kind, path=path, random_init=True, seed=3).eval()
    processor = native_processor(tower_named(kind).native, path)
    grids = [processor.grid(*image.size) for image in images()]
    assert len(set(grids)) == 2
    with torch.no_grad():
        found = encoder(processor(images()), grids)
    start = 0
    for image, (rows, columns) in zip(images(), grids, strict=True):
        pixels = processor([image])
        with torch.no_grad():
            if kind == "aimv2":
                picture = pixels.reshape(rows, columns, 3, 4, 4).permute(2, 0, 3, 1, 4)
                wanted = encoder.tower(picture.reshape(1, 3, rows * 4, columns * 4)).last_hidden_state[0]
            else:
                grid = torch.tensor([[1, rows * 2, columns * 2]])
                wanted = encoder.tower(pixels, grid_thw=grid).pooler_output
        assert wanted.shape == (rows * columns, encoder.hidden_size)
        torch.testing.assert_close(found[start : start + rows * columns], wanted, atol=1e-5, rtol=1e-4)
        start += rows * columns
    assert start == len(found)


def test_no_image_keeps_every_parameter_in_the_graph(tmp_path, kind):
    encoder = build_native_encoder(kind, path=write_directory(tmp_path / "tower", kind), random_init=True)
    out = encoder(torch.empty(0, 96), ())
    assert out.shape == (0, encoder.hidden_size)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_every_parameter_has_a_gradient(tmp_path, kind):
    path = write_directory(tmp_path / "tower", kind)
    encoder = build_native_encoder(kind, path=path, random_init=True)
    processor = native_processor(tower_named(kind).native, path)
    encoder(
        processor(images()), [processor.grid(*image.size) for image in images()]
    ).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


@pytest.mark.parametrize("prefix", ["", "whole"])
def test_weights_are_read_from_a_tower_and_a_whole_checkpoint(tmp_path, kind, prefix):
    path = write_directory(tmp_path / "tower", kind)
    wanted = build_native_encoder(kind, path=path, random_init=True, seed=7)
    start = {"aimv2": "vision_model."}.get(kind, "model.visual.") if prefix else ""
    weights = {start + name: tensor.contiguous() for name, tensor in wanted.tower.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    found = build_native_encoder(kind, path=path)
    for (name, a), (_, b) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    weights.pop(next(iter(weights)))
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ValueError, match="weights of the vision tower are missing"):
        build_native_encoder(kind, path=path)


def test_wrong_directory_is_refused(tmp_path, kind):
    other = next(name for name in CONFIGS if name != kind)
    with pytest.raises(ValueError, match=f"model_type='.*', wanted '.*'; set vision to '{other}'"):
        build_native_encoder(kind, path=write_directory(tmp_path / "tower", other), random_init=True)
