"""Towers against transformers called directly, with tiny random weights."""

import json

import pytest
import torch
import transformers

from laver_mcore.model.vision_encoders import PatchEmbedder, build_vision_encoder, read_patch_size

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 8,
}
CLASSES = {
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config),
}


@pytest.fixture(params=list(CLASSES))
def kind(request):
    return request.param


@pytest.fixture
def directory(kind, tmp_path):
    model_class, config_class = CLASSES[kind]
    torch.manual_seed(3)
    model = model_class(config_class(**TINY))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases off their start, so that each one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    return tmp_path


def reference(kind, directory, pixels):
    model = CLASSES[kind][0].from_pretrained(directory).eval()
    with torch.no_grad():
        return model(pixel_values=pixels, output_hidden_states=True)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
def test_states_equal_transformers(kind, directory, layer, select):
    if kind == "siglip" and select == "cls_patch":
        pytest.skip("SigLIP has no CLS token")
    pixels = torch.randn(2, 3, 30, 30)
    out = reference(kind, directory, pixels)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    if kind != "siglip" and select == "patch":
        expected = expected[:, 1:]
    encoder = build_vision_encoder(kind, path=directory, layer=layer, select=select).eval()
    assert encoder.grid == (3, 3)
    assert encoder.hidden_size == 32
    actual = encoder(pixels)
    assert actual.shape == (2, encoder.num_tokens, 32)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_every_parameter_has_a_gradient(kind, layer, num_images):
    encoder = build_vision_encoder(kind, config=TINY, layer=layer)
    tokens = encoder(torch.randn(num_images, 3, 30, 30))
    assert tokens.shape == (num_images, 9, 32)
    tokens.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        if num_images == 0:
            assert not parameter.grad.any(), name


def test_frozen_tower_builds_no_graph(kind):
    encoder = build_vision_encoder(kind, config=TINY).requires_grad_(False)
    assert not encoder(torch.randn(1, 3, 30, 30)).requires_grad
    assert not encoder(torch.randn(0, 3, 30, 30)).requires_grad


def test_whole_two_tower_checkpoints_load(tmp_path):
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    for kind, config_class, model_class in (
        ("siglip", transformers.SiglipConfig, transformers.SiglipModel),
        ("clip", transformers.CLIPConfig, transformers.CLIPModel),
    ):
        directory = tmp_path / kind
        whole = model_class(config_class(text_config=text, vision_config=TINY))
        whole.save_pretrained(directory)
        assert read_patch_size(directory) == 8
        encoder = build_vision_encoder(kind, path=directory)
        weight = whole.vision_model.embeddings.patch_embedding.weight
        assert torch.equal(encoder.tower.embeddings.patch_embedding.weight, weight)


def test_random_weights_follow_the_seed(kind):
    def weights(seed):
        torch.manual_seed(torch.seed() % 1000)  # the caller's generator must not matter
        encoder = build_vision_encoder(kind, config=TINY, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_meta_device_reads_no_weights(kind, directory):
    (directory / "model.safetensors").unlink()
    encoder = build_vision_encoder(kind, path=directory, dtype=torch.bfloat16, device="meta")
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    real = build_vision_encoder(kind, config=TINY)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in real.parameters())


def test_bfloat16_takes_float32_pixels(kind):
    encoder = build_vision_encoder(kind, config=TINY, dtype=torch.bfloat16)
    assert encoder(torch.randn(1, 3, 30, 30)).dtype == torch.bfloat16


def test_dinov2_interpolates_its_positions(tmp_path):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 48, 32)
    encoder = build_vision_encoder("dinov2", path=tmp_path).eval()
    torch.testing.assert_close(encoder(pixels), model(pixel_values=pixels).last_hidden_state[:, 1:])
    assert encoder(torch.randn(0, 3, 48, 32)).shape == (0, 24, 32)


def _siglip_directory(path, **changes):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **TINY, **changes}))
    return path


BAD = [
    pytest.param({"kind": "sam"}, "vision='sam' is not known; did you mean", id="unknown kind"),
    pytest.param({"kind": "siglip"}, "needs vision_path", id="no path"),
    pytest.param({"kind": "siglip", "path": "absent"}, "no such file", id="no directory"),
    pytest.param({"kind": "clip", "path": "siglip"}, "set vision to 'siglip'", id="another tower"),
    pytest.param({"kind": "siglip", "path": "naflex"}, "'siglip2', wanted 'siglip'", id="native resolution"),
    pytest.param({"kind": "siglip", "path": "siglip"}, "safetensors", id="no weights"),
    pytest.param({"kind": "siglip", "config": TINY, "layer": -4}, "use -3 to -1", id="too deep"),
    pytest.param({"kind": "siglip", "config": TINY, "layer": 2}, "use -3 to -1", id="positive layer"),
    pytest.param({"kind": "siglip", "config": TINY, "select": "cls_patch"}, "no CLS token", id="no CLS"),
    pytest.param({"kind": "clip", "config": TINY, "select": "cls"}, "use 'patch' or", id="unknown selection"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_choices_are_named(tmp_path, arguments, message):
    _siglip_directory(tmp_path / "siglip")
    _siglip_directory(tmp_path / "naflex", model_type="siglip2")
    arguments = dict(arguments)
    if "path" in arguments:
        arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(ValueError, match=message):
        build_vision_encoder(arguments.pop("kind"), **arguments)


def test_incomplete_weights_are_refused(tmp_path):
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**{**TINY, "num_hidden_layers": 2})
    )
    model.save_pretrained(tmp_path)
    _siglip_directory(tmp_path)
    with pytest.raises(ValueError, match="are missing"):
        build_vision_encoder("siglip", path=tmp_path)


def test_other_image_sizes_are_refused():
    encoder = build_vision_encoder("siglip", config=TINY)
    with pytest.raises(ValueError, match="takes 30 x 30"):
        encoder(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("num_patches", [0, 1, 7])
def test_patch_embedder_is_a_three_layer_gelu_mlp(num_patches):
    embedder = PatchEmbedder(4, 10, 6)
    patches = torch.randn(num_patches, 48)
    first, second, third = (embedder.layers[i] for i in (0, 2, 4))
    expected = third(torch.nn.functional.gelu(second(torch.nn.functional.gelu(first(patches)))))
    out = embedder(patches)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in embedder.parameters())
