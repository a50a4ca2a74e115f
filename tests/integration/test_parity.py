"""Our decoder and transformers' Qwen2ForCausalLM with the same random weights: logits, layers, gradients."""

import json

import pytest
import torch

from integration.harness import torchrun
from laver_mcore.convert.reference import LayerOutputs

# Head ratios of Qwen2.5-7B (28 : 4) and 0.5B (14 : 2), scaled down where a layer would be large.
SHAPES = {
    "untied_7to1": dict(
        hidden_size=112, heads=14, groups=2, intermediate_size=96, layers=2, tied=False, vocab_size=101
    ),
    "tied_2to1": dict(
        hidden_size=64, heads=8, groups=4, intermediate_size=160, layers=4, tied=True, vocab_size=96
    ),
}
LAYOUTS = ("tp1", "tp2", "tp2_sp", "pp2", "pp2_vp2")
CASES = [
    (shape, layout) for shape in SHAPES for layout in LAYOUTS if (shape, layout) != ("untied_7to1", "pp2_vp2")
]


def write_case(path, shape):
    """A random Qwen2, two documents, and what transformers computes on each by itself."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        tie_word_embeddings=shape["tied"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.15,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # zeros and ones would hide a mistake
    documents = [torch.randint(0, shape["vocab_size"], (length,)) for length in (23, 11)]
    logits, layers, losses = [], [[] for _ in range(shape["layers"])], []
    for document in documents:
        with LayerOutputs(model.model.layers) as captured:
            logits.append(model(document[None]).logits[0])
        for into, hidden in zip(layers, captured, strict=True):
            into.append(hidden[0].detach())
        losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], document[1:], reduction="sum"))
    (sum(losses) / sum(len(d) - 1 for d in documents)).backward()
    torch.save(
        {
            "config": {k: v for k, v in config.to_dict().items() if isinstance(v, int | float | bool | dict)},
            "weights": {k: v.detach() for k, v in model.state_dict().items()},
            "gradients": {k: v.grad for k, v in model.named_parameters()},
            "documents": [d.tolist() for d in documents],
            "logits": [x.detach() for x in logits],
            "layers": layers,
        },
        path,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity")
    for name, shape in SHAPES.items():
        write_case(directory / f"{name}.pt", shape)
    found = {}
    for num_ranks in (1, 2):
        done = torchrun(num_ranks, "tests/integration/parity_worker.py", str(directory), timeout=120)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found |= json.loads((directory / f"results_{num_ranks}.json").read_text())
    return found


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_logits_agree(results, shape, layout):
    result = results[f"{shape}-{layout}"]
    assert result["scale"] > 1.0
    assert max(result["layers"]) < 1e-4
    assert result["logits"] < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_agree(results, shape):
    gradients = results[f"{shape}-tp1"]["gradients"]
    assert len(gradients) > 10
    for name, difference in gradients.items():
        assert difference < 1e-4, name
