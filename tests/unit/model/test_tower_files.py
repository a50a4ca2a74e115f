"""Files of a vision tower as people have them: every tensor is used or refused, in one line with file and tensor."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from laver_mcore.config.errors import ConfigError
from laver_mcore.model.native_encoders import build_native_encoder
from laver_mcore.model.vision_encoders import build_vision_encoder

VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
QWEN = dict(depth=2, embed_dim=16, hidden_size=24, num_heads=2, patch_size=7, mlp_ratio=2)
MODELS = {
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**VIT, intermediate_size=24)
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT, intermediate_size=24)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT, mlp_ratio=2)),
    "qwen2-vl": lambda: transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(
        transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(**QWEN)
    ),
    "aimv2": lambda: transformers.Aimv2VisionModel(
        transformers.Aimv2VisionConfig(**VIT, intermediate_size=24, is_native=True)
    ),
}
LAYERS = {"qwen2-vl": "depth"}


@pytest.fixture(scope="module", params=MODELS)
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param]().save_pretrained(folder)
    return (
        request.param,
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )


def build(kind, path):
    if kind in ("qwen2-vl", "aimv2"):
        return build_native_encoder(kind, path=path)
    return build_vision_encoder(kind, path=path)


def matrix(tensors):
    """A matrix in the last layer; a filter of what has no layers."""
    found = [name for name in tensors if tensors[name].ndim == 2 and re.search(r"\.1\.", name)]
    return max(found or [name for name in tensors if tensors[name].ndim == 4])


def change(function):
    """A fault of one tensor: `function(tensor)` in its place."""

    def fault(folder, kind, tensors, config):
        name = matrix(tensors)
        save_file(tensors | {name: function(tensors[name]).contiguous()}, folder / "model.safetensors")
        return name

    return fault


def write(text):
    def fault(folder, kind, tensors, config):
        (folder / "model.safetensors").write_bytes(text)

    return fault


def truncated(folder, kind, tensors, config):
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def fewer_layers(folder, kind, tensors, config):
    save_file(tensors, folder / "model.safetensors")
    config = {n: v for n, v in config.items() if n not in ("stage_names", "out_features", "out_indices")}
    (folder / "config.json").write_text(json.dumps(config | {LAYERS.get(kind, "num_hidden_layers"): 1}))


def registers(folder, kind, tensors, config):
    first = next(iter(tensors)).split(".")[0]
    name = "embeddings.register_tokens" if kind == "dinov2" else f"{first}.register_tokens"
    save_file(tensors | {name: torch.zeros(1, 4, 16)}, folder / "model.safetensors")
    return name


def missing(folder, kind, tensors, config):
    save_file({n: t for n, t in tensors.items() if n != matrix(tensors)}, folder / "model.safetensors")


def two_files(folder, kind, tensors, config):
    name = matrix(tensors)
    save_file(tensors, folder / "a.safetensors")
    save_file({name: tensors[name]}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {name: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return name


def index(text):
    def fault(folder, kind, tensors, config):
        (folder / "model.safetensors.index.json").write_text(text)

    return fault


def config(text):
    def fault(folder, kind, tensors, config):
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(config | text))

    return fault


UNREADABLE = r"model\.safetensors: truncated or not a safetensors file \(.+\); download it again"
# What is wrong -> (how it comes about, words of the line; TENSOR is the tensor's name).
FAULTS = {
    "truncated": (truncated, UNREADABLE),
    "empty": (write(b""), UNREADABLE),
    "Git LFS pointer": (write(b"version https://git-lfs.github.com/spec/v1\nsize 4\n"), UNREADABLE),
    "fewer layers in the config": (fewer_layers, r"model\.safetensors: .*\b1\..* has no place in the vision tower"),
    "int8": (change(lambda t: t.to(torch.int8)), r"model\.safetensors: TENSOR is I8, codes without their scales"),
    "F8": (change(lambda t: t.to(torch.float8_e4m3fn)), r"TENSOR is F8_E4M3, codes without their scales"),
    "a side that broadcasts": (change(lambda t: t[:1]), r"TENSOR is \[1, [\d, ]+\], its config\.json asks for \["),
    "transposed side": (change(lambda t: t[:, :-1]), r"TENSOR is .*, its config\.json asks for"),
    "NaN": (change(lambda t: t * float("nan")), r"model\.safetensors: TENSOR holds NaN or infinity"),
    "infinity": (change(lambda t: t.clone().index_fill_(0, torch.tensor([0]), torch.inf)), "TENSOR holds NaN"),
    "registers": (registers, r"TENSOR has no place in the vision tower"),
    "a tensor that is missing": (missing, "1 weights of the vision tower are missing"),
    "a tensor in two files": (two_files, r"TENSOR is in .*a\.safetensors and in .*b\.safetensors"),
    "index that is no JSON": (index("{"), "index.json: no weight_map of files"),
    "index that is a list": (index("[]"), "index.json: no weight_map of files"),
    "index of numbers": (index('{"weight_map": {"x": 3}}'), "index.json: no weight_map of files"),
    "index that leads out": (index('{"weight_map": {"x": "../y.safetensors"}}'), "no weight_map of files beside"),
    "index of a file that is gone": (index('{"weight_map": {"x": "y.safetensors"}}'), "y.safetensors is missing"),
    "no weights": (lambda *_: None, "holds neither model.safetensors nor"),
    "config that is no JSON": (config("{"), r"config\.json: broken JSON"),
    "config that is a list": (config("[]"), r"config\.json: wanted a JSON mapping, got list"),
    "vision_config null": (config({"vision_config": None}), "vision_config=None is no mapping"),
    "hidden_size text": (config({"hidden_size": "x"}), r"config\.json: settings of which no tower"),
    "another architecture": (config({"model_type": "sam"}), "model_type='sam'"),
    "no patch": (config({"patch_size": 0}), r"config\.json(: settings of which no tower| asks for)"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line(published, fault, words, tmp_path):
    kind, tensors, settings = published
    (tmp_path / "config.json").write_text(json.dumps(settings))
    name = fault(tmp_path, kind, tensors, settings)
    with pytest.raises(ConfigError) as caught:
        build(kind, tmp_path)
    assert re.search(words.replace("TENSOR", re.escape(name or "")), str(caught.value))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# Tensors that stand beside a tower's and are not missed.
BESIDE = {
    "siglip": ["text_model.embeddings.x", "logit_scale", "logit_bias"],
    "clip": ["text_model.embeddings.x", "visual_projection.weight", "vision_model.embeddings.position_ids"],
    "dinov2": ["classifier.weight"],
    "qwen2-vl": ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
    "aimv2": ["text_model.embeddings.x", "logit_scale"],
}


def test_the_rest_of_a_whole_checkpoint_is_not_the_towers(published, tmp_path):
    kind, tensors, settings = published
    (tmp_path / "config.json").write_text(json.dumps(settings))
    beside = {name: torch.zeros(2, dtype=torch.int8) for name in BESIDE[kind]}
    save_file(tensors | beside, tmp_path / "model.safetensors")
    found = sum(p.numel() for p in build(kind, tmp_path).parameters())
    assert found <= sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2"])
def test_positions_of_another_image_size(kind, tmp_path):
    """The case "another image size": weights for 28 pixels, a config that says 56."""
    MODELS[kind]().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"image_size": 56}))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: .*position_embedding.* is \[.*config\.json asks for"
    ):
        build(kind, tmp_path)
