"""Frozen encoders that give targets, against transformers' own models, and the account of their weights."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.targets import TargetEncoder
from laver_mcore.model.frozen_encoders import build_frozen_encoder, target_width
from laver_mcore.shapes.frozen import frozen_entries, frozen_shape, input_side, window_pairs

VIT = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
SAM = dict(
    hidden_size=32, output_channels=12, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16,
    window_size=3, global_attn_indexes=[1], mlp_dim=48,
)  # fmt: skip
RADIO = """
import torch, transformers
from collections import namedtuple
Output = namedtuple("Output", "summary features")
class Config(transformers.PretrainedConfig):
    model_type = "tiny_radio"
class Model(transformers.PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.projection = torch.nn.Conv2d(3, 10, 16, 16)
        self.post_init()
    def forward(self, pixels):
        found = self.projection(pixels).flatten(2).transpose(1, 2)
        return Output(found.mean(1), found)
"""


def sam():
    return transformers.SamModel(transformers.SamConfig(vision_config=SAM))


def depth_anything():
    backbone = transformers.Dinov2Config(
        **VIT, mlp_ratio=2, out_features=["stage1", "stage3"], reshape_hidden_states=False
    )
    sizes = dict(
        reassemble_hidden_size=16, neck_hidden_sizes=[8, 8], reassemble_factors=[2, 1], fusion_hidden_size=8
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=7, head_hidden_size=4, **sizes
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**VIT, mlp_ratio=2))


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT, intermediate_size=24))


MODELS = {"dinov2": dinov2, "clip": clip, "sam": sam, "depth_anything": depth_anything}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(kind, directory, a model of transformers with its weights)."""
    torch.manual_seed(3)
    model = MODELS[request.param]().eval()
    if request.param == "sam":  # tables that start at zero would hide a wrong one
        for parameter in model.vision_encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, folder, model


def oracle(kind, model, pixels):
    """(features, grid) from the whole model."""
    if kind == "sam":
        return model.get_image_embeddings(pixels).flatten(2).transpose(1, 2), (4, 4)
    if kind == "clip":
        return model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:], (4, 4)
    if kind == "depth_anything":
        whole = transformers.Dinov2Model(transformers.Dinov2Config(**VIT, mlp_ratio=2)).eval()
        whole.load_state_dict(model.backbone.state_dict())
        model = whole
    return model(pixels).last_hidden_state[:, 1:], tuple(side // 7 for side in pixels.shape[-2:])


def test_features_are_the_models(saved):
    kind, folder, model = saved
    encoder = build_frozen_encoder(TargetEncoder(kind=kind, path=str(folder)), dtype=torch.float32)
    pixels = torch.randn(2, 3, *([64, 64] if kind == "sam" else [28, 28]))
    with torch.no_grad():
        wanted, grid = oracle(kind, model, pixels)
    features, found_grid = encoder(pixels)
    torch.testing.assert_close(features, wanted)
    assert found_grid == grid and wanted.shape[1] == grid[0] * grid[1]
    assert features.shape[-1] == target_width(TargetEncoder(kind=kind, path=str(folder)))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["dinov2", "depth_anything"])
def test_another_size_of_image_gives_another_grid(kind, tmp_path):
    model = MODELS[kind]().eval()
    model.save_pretrained(tmp_path)
    encoder = build_frozen_encoder(TargetEncoder(kind=kind, path=str(tmp_path)), dtype=torch.float32)
    features, grid = encoder(torch.randn(1, 3, 42, 42))
    assert grid == (6, 6) and features.shape == (1, 36, 16)


def test_the_account_counts_every_weight(saved):
    kind, folder, _ = saved
    target = TargetEncoder(kind=kind, path=str(folder), image_size=64 if kind == "sam" else 28)
    encoder = build_frozen_encoder(target, dtype=torch.float32)
    shape = frozen_shape(target)
    unused = sum(p.numel() for name, p in encoder.named_parameters() if name.endswith("mask_token"))
    counted = sum(torch.Size(sides).numel() for _, sides, _ in frozen_entries(shape))
    assert counted == sum(p.numel() for p in encoder.parameters()) - unused
    assert shape.fixed_tokens == 16
    if kind == "sam":  # 4 x 4 patches in windows of 3 are padded to 6 x 6: four windows of nine
        assert window_pairs(shape) == 4 * 9**2


def test_weights_that_are_not_the_files_are_named(saved, tmp_path):
    """What the released code of VIRAL trains against, very likely: an encoder drawn anew where a name did not match."""
    kind, folder, _ = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    part = {"sam": "vision_encoder.", "depth_anything": "backbone."}.get(kind, "")
    name = next(
        n
        for n in tensors
        if n.startswith(part) and "layer" in n and n.endswith("weight") and tensors[n].ndim == 2
    )
    save_file(
        {n.replace(name, "another.weight"): t for n, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        ConfigError,
        match=r"1 of \d+ weights of the frozen encoder are not those|another.weight has no place in the vision",
    ):
        build_frozen_encoder(TargetEncoder(kind=kind, path=str(tmp_path)), dtype=torch.float32)


def test_a_random_encoder_is_another_and_the_same_again(saved):
    kind, folder, _ = saved
    target = TargetEncoder(kind=kind, path=str(folder))
    drawn = TargetEncoder(kind=kind, path=str(folder), random_init=True)
    digests = [
        build_frozen_encoder(t, seed=5, dtype=torch.float32).digest() for t in (target, target, drawn, drawn)
    ]
    assert digests[0] == digests[1] != digests[2] == digests[3]


@pytest.fixture
def radio(tmp_path):
    (tmp_path / "tiny_radio_code.py").write_text(RADIO)
    auto = {"AutoConfig": "tiny_radio_code.Config", "AutoModel": "tiny_radio_code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny_radio", "auto_map": auto}))
    torch.manual_seed(4)
    layer = torch.nn.Conv2d(3, 10, 16, 16)
    save_file(
        {f"projection.{name}": p.detach() for name, p in layer.named_parameters()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return SimpleNamespace(path=str(tmp_path), layer=layer)


def test_radio_runs_a_directorys_code_only_where_allowed(radio):
    with pytest.raises(ConfigError, match="allow it: --target-remote-code"):
        build_frozen_encoder(TargetEncoder(kind="radio", path=radio.path, width=10), dtype=torch.float32)
    allowed = TargetEncoder(kind="radio", path=radio.path, width=10, remote_code=True)
    features, grid = build_frozen_encoder(allowed, dtype=torch.float32)(pixels := torch.randn(1, 3, 48, 48))
    torch.testing.assert_close(features, radio.layer(pixels).flatten(2).transpose(1, 2))
    assert grid == (3, 3) and target_width(allowed) == 10
    with pytest.raises(ConfigError, match="needs target_width"):
        target_width(TargetEncoder(kind="radio", path=radio.path, remote_code=True))


@pytest.mark.parametrize("kind", ["sam", "depth_anything", "dinov2"])
def test_another_models_directory_is_named(kind, radio):
    with pytest.raises(ConfigError, match=r"config.json: model_type='tiny_radio', wanted"):
        build_frozen_encoder(TargetEncoder(kind=kind, path=radio.path), dtype=torch.float32)


PUBLISHED = {  # millions of weights as the model cards say, tokens at the processor's own size
    "dinov2": (86.6, 256),
    "depth_anything": (86.6, 1369),
    "sam": (89.7, 4096),
    "clip": (290.4, 576),  # CLIP-L has 303.5; the last of 24 layers, 12.6, and the last norm are cut off
    "radio": (None, 729),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_without_a_directory_the_published_one_is_counted(kind):
    millions, tokens = PUBLISHED[kind]
    shape = frozen_shape(TargetEncoder(kind=kind))
    assert shape.fixed_tokens == tokens
    if millions is not None:
        counted = sum(torch.Size(sides).numel() for _, sides, _ in frozen_entries(shape))
        assert counted / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        (
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
            },
            224,
        ),
        (
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": False,
            },
            256,
        ),
        ({"size": {"longest_edge": 1024}}, 1024),
        ({"size": {"height": 518, "width": 518}}, 518),
        ({"size": 384}, 384),
        ({}, 224),
    ],
)
def test_the_side_is_the_processors_own(processor, side, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert input_side(TargetEncoder(kind="dinov2", path=str(tmp_path))) == side
    assert input_side(TargetEncoder(kind="dinov2", path=str(tmp_path), image_size=336)) == 336
