"""VIRAL's targets and loss against transformers and the paper's formula in fp64."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config, ModelConfig, TrainConfig, VisionConfig
from laver_mcore.config.targets import TargetEncoder
from laver_mcore.data.images.target_cache import TargetCacheWriter
from laver_mcore.model.frozen_encoders import build_frozen_encoder
from laver_mcore.model.method import ModelOutput
from laver_mcore.objectives.head import Head
from laver_mcore.objectives.viral import LOSS, Viral, ViralConfig, _encoder, resample

WIDTH, Z, GRIDS = 24, 16, ((4, 4), (2, 3))
TOPOLOGY = SimpleNamespace(device=torch.device("cpu"), num_shares=1, share=0, tp_cp_group=None, cp_group=None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny DINOv2 with weights, 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(7)
    config = transformers.Dinov2Config(
        hidden_size=Z, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def recipe(directory, **settings) -> Config:
    return Config(
        model=ModelConfig(hidden_size=WIDTH, num_layers=6),
        vision=VisionConfig(vision="encoder-free"),
        objective=ViralConfig(
            **{"target_path": str(directory), "target_layers": (2, 5), "projector_hidden_size": 10} | settings
        ),
    )


def made(config) -> Viral:
    torch.manual_seed(1)
    settings = config.objective
    encoder = _encoder(settings.target_encoder(), TrainConfig(bf16=False), torch.device("cpu"))
    kind = dict(dtype=torch.float32, device="cpu")
    heads = {
        name: Head(settings.projector_widths(config), torch.nn.SiLU, **kind) for name in settings.projectors()
    }
    return Viral(config, TOPOLOGY, encoder, [heads[name] for name in settings.projectors()])


def batch_of(pixels=None, grids=GRIDS):
    lengths = tuple(h * w for h, w in grids)
    return SimpleNamespace(image_grids=grids, image_lengths=lengths, targets=pixels)


def test_targets_are_the_checkpoints_patch_tokens(directory):
    viral, pixels = made(recipe(directory)), torch.randn(1, 3, 28, 28)
    plan = viral.plan(batch_of(pixels, GRIDS[:1]), 0)
    visual = torch.randn(16, WIDTH, requires_grad=True)
    entering = viral.enter(visual, plan)
    model = transformers.Dinov2Model.from_pretrained(directory).eval()
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state[0, 1:]
    assert entering.dialogue_ND is visual  # the model's own tokens are left alone
    (target,) = entering.travelling
    assert target.shape == (16, WIDTH)
    torch.testing.assert_close(target[:, :Z], wanted)
    assert not target[:, Z:].any()


def test_a_random_target_is_another(directory):
    pixels = torch.randn(2, 3, 28, 28)
    real, drawn = (
        _encoder(
            TargetEncoder(kind="dinov2", path=str(directory), random_init=random),
            TrainConfig(bf16=False),
            torch.device("cpu"),
        )(pixels)[0]
        for random in (False, True)
    )
    assert (real - drawn).norm() > 0.1 * real.norm()


def test_kept_features_are_the_encoders(directory, tmp_path):
    """What enters from a cache is what enters beside the step, rounded to bfloat16; and nothing is encoded."""
    pixels = torch.randn(2, 3, 28, 28)
    encoder = build_frozen_encoder(TargetEncoder(kind="dinov2", path=str(directory)), dtype=torch.float32)
    features, grid = encoder(pixels)
    TargetCacheWriter(tmp_path, dict(kind="dinov2", view="whole", grid=list(grid), width=Z))
    beside, kept = made(recipe(directory)), made(recipe(None, target_path=None, target_cache=str(tmp_path)))
    visual = torch.randn(22, WIDTH)
    bits = features.bfloat16().view(torch.int16)
    wanted, found = (
        viral.enter(visual, viral.plan(batch_of(given), 0)).travelling[0]
        for viral, given in ((beside, pixels), (kept, bits))
    )
    assert wanted[:, :Z].std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=2**-8)
    assert not torch.equal(found, wanted)


def ramp(rows: int, columns: int) -> torch.Tensor:
    """Features (1, row, column) with the grid from 0 to 1, row by row."""
    r, c = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
    )
    return torch.stack([torch.ones_like(r), r, c], -1).flatten(0, 1)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (6, 6)])
def test_resampling_keeps_places(grid):
    """A plane stays a plane, up to the rim, where neighbours are missing."""
    found = resample(ramp(4, 4)[None], (4, 4), (grid,)).unflatten(0, grid)
    wanted = ramp(*grid).unflatten(0, grid)
    assert torch.allclose(found[..., 0], wanted[..., 0])
    inner = (slice(grid[0] // 4, -(grid[0] // 4)),) * 2
    assert torch.allclose(found[inner], wanted[inner], atol=1e-5)
    if grid == (4, 4):
        assert torch.equal(found, wanted)


def test_rows_are_in_the_order_of_images():
    features = torch.stack([ramp(4, 4), 10 + ramp(4, 4)])
    found = resample(features, (4, 4), GRIDS)
    assert found.shape == (22, 3)
    assert (found[:16, 0] == 1).all()
    assert torch.allclose(found[16:, 0], torch.full((6,), 11.0))


@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients_are_the_formula(directory, shared):
    viral = made(recipe(directory, shared_projector=shared))
    plan = viral.plan(batch_of(), 0)
    torch.manual_seed(2)
    target = torch.nn.functional.pad(torch.randn(22, Z), (0, WIDTH - Z))
    states = [torch.randn(22, WIDTH, requires_grad=True) for _ in range(2)]
    output = ModelOutput(
        dialogue_TD=states[0],
        images_ND=None,
        target_NK=None,
        travelling=(target, *states),
        output_weight_VD=states[0],
    )
    found = viral.sums(output, plan)[LOSS]
    found.backward()
    assert plan.counts == {LOSS: 2}
    assert viral.weights == {LOSS: 0.5}
    wanted, twins = 0.0, [s.detach().double().requires_grad_() for s in states]
    for twin, head in zip(twins, viral._projectors, strict=True):
        x = twin
        for number in (0, 2, 4):
            layer = head.layers[number]
            x = x @ layer.weight.detach().double().T + layer.bias.detach().double()
            x = x * torch.sigmoid(x) if number < 4 else x
        y = target[:, :Z].double()
        cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
        wanted = wanted - (cosine[:16].mean() + cosine[16:].mean()) / 2
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for state, twin in zip(states, twins, strict=True):
        torch.testing.assert_close(state.grad.double(), twin.grad, rtol=1e-5, atol=1e-8)
    assert (viral._projectors[0] is viral._projectors[1]) == shared
    assert all(p.grad.abs().sum() > 0 for head in viral._projectors for p in head.parameters())


REFUSED = {
    "no_path": (dict(target_path=None), "needs target_path"),
    "no_cache": (dict(target_path=None, target_cache="nowhere"), "nowhere: no cache.json there"),
    "image_size": (dict(target_image_size=0), "must be positive"),
    "layer": (dict(target_layers=(7,)), "the decoder has layers 1 to 6"),
    "layer_0": (dict(target_layers=(0, 2)), "the decoder has layers 1 to 6"),
    "order": (dict(target_layers=(3, 2)), "must be rising"),
    "kind": (dict(target="clip"), "model_type='dinov2'"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_named(directory, settings, message):
    config = recipe(directory, **settings)
    with pytest.raises(ConfigError, match=message):
        config.objective.check(config)


def test_a_wide_target_is_named(directory, tmp_path):
    content = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"hidden_size": 99}))
    config = recipe(tmp_path)
    with pytest.raises(ConfigError, match="width 99 is more than the decoder's 24"):
        config.objective.check(config)


def test_each_layer_may_have_its_own_projector(directory):
    config = recipe(directory, shared_projector=False)
    names = {weight.name.split(".")[0] for weight in config.objective.parameters(config)}
    assert names == {"projector_2", "projector_5"}
    shared = replace(config, objective=replace(config.objective, shared_projector=True))
    assert {w.uses for w in shared.objective.parameters(shared) if w.name.endswith("weight")} == {2}
