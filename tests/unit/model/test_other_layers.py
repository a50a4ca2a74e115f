"""Checkpoints between Megatron's local layers and Transformer Engine's, whose modules keep something of their own."""

import pytest
import torch
from unit.train.test_checkpoint import (  # noqa: F401 (fixtures)
    FINGERPRINT,
    STEPS,
    config_of,
    device,
    engine_of,
    recipe,
    state_of,
    take_steps,
)

from laver_mcore.megatron.checkpoints import CheckpointError
from laver_mcore.model import layer_spec
from laver_mcore.model.norm import RMSNorm
from laver_mcore.train import checkpoint
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.saved_weights import put_weights


class KeepingNorm(RMSNorm):
    """As Transformer Engine's: an entry more in its state, empty where nothing is in fp8, that it insists on."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state.numel() == 0


def test_layers_do_not_show_in_a_checkpoint(recipe, device, tmp_path, monkeypatch):  # noqa: F811
    """Saved with one kind and loaded into the other, both ways, as a resume and as weights to start from."""
    states, plain = {}, layer_spec.RMSNorm
    for name, norm in (("local", plain), ("engine", KeepingNorm)):
        monkeypatch.setattr(layer_spec, "RMSNorm", norm)
        engine = engine_of(config_of(recipe), device)
        keeping = any(key.endswith("norm._extra_state") for key in engine.chunks[0].state_dict())
        assert keeping == (name == "engine")
        take_steps(engine, 0, STEPS)
        checkpoint.save(engine, tmp_path / name, Progress(iteration=STEPS, consumed_rows=12), FINGERPRINT)
        states[name] = state_of(engine)
    for name, norm in (("local", KeepingNorm), ("engine", plain)):
        monkeypatch.setattr(layer_spec, "RMSNorm", norm)
        engine = engine_of(config_of(recipe), device)
        assert checkpoint.load(engine, tmp_path / name, FINGERPRINT).iteration == STEPS
        for key, tensor in state_of(engine).items():
            assert torch.equal(tensor, states[name][key]), key
        started = engine_of(config_of(recipe, f"--pretrained-checkpoint {tmp_path / name}"), device)
        for key, parameter in started.chunks[0].named_parameters():
            assert torch.equal(parameter, states[name][key]), key


def test_what_is_missing_of_a_whole_model_is_named(recipe, device):  # noqa: F811
    chunk = engine_of(config_of(recipe), device).chunks[0]
    state = chunk.state_dict()
    lost = state.pop("connector.layers.0.weight")
    put_weights(chunk, state, whole=False)
    with pytest.raises(CheckpointError, match=r"another model: connector\.layers\.0\.weight does not fit"):
        put_weights(chunk, state, whole=True)
    with pytest.raises(CheckpointError, match="another model: nobody does not fit"):
        put_weights(chunk, {**state, "connector.layers.0.weight": lost, "nobody": lost}, whole=True)
