"""Our decoders and transformers' with the same random weights: logits, layers, gradients, under parallel layouts."""

import json

import pytest
import torch
from sample_decoders import FAMILIES, random_decoder

from integration.harness import torchrun
from laver_mcore.convert.reference import LayerOutputs

LAYOUTS = ("tp1", "tp2", "tp2_sp", "pp2", "pp2_vp2")
# Four layers can be cut into four chunks.
LAYERS = {name: 4 if name == "qwen2_tied" else 2 for name in FAMILIES}
CASES = [
    (name, layout) for name in FAMILIES for layout in LAYOUTS if layout != "pp2_vp2" or LAYERS[name] == 4
]


def write_case(directory, name):
    """A random model with its directory, two documents, and what transformers computes on each by itself."""
    model = random_decoder(name, layers=LAYERS[name])
    model.save_pretrained(directory / name)
    documents = [torch.randint(0, model.config.vocab_size, (length,)) for length in (23, 11)]
    logits, layers, losses = [], [[] for _ in model.model.layers], []
    for document in documents:
        with LayerOutputs(model.model.layers) as captured:
            logits.append(model(document[None]).logits[0])
        for into, hidden in zip(layers, captured, strict=True):
            into.append(hidden[0].detach())
        losses.append(torch.nn.functional.cross_entropy(logits[-1][:-1], document[1:], reduction="sum"))
    (sum(losses) / sum(len(d) - 1 for d in documents)).backward()
    torch.save(
        {
            "gradients": {k: v.grad for k, v in model.named_parameters()},
            "documents": [d.tolist() for d in documents],
            "logits": [x.detach() for x in logits],
            "layers": layers,
        },
        directory / f"{name}.pt",
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parity")
    for name in FAMILIES:
        write_case(directory, name)
    found = {}
    for num_ranks in (1, 2):
        done = torchrun(num_ranks, "tests/integration/parity_worker.py", str(directory), timeout=240)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found |= json.loads((directory / f"results_{num_ranks}.json").read_text())
    return found


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_agree(results, name, layout):
    result = results[f"{name}-{layout}"]
    assert result["scale"] > 1.0
    assert max(result["layers"]) < 1e-4
    assert result["logits"] < 1e-4


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_gradients_agree(results, name, layout):
    gradients = results[f"{name}-{layout}"]["gradients"]
    assert len(gradients) > 10
    for weight, difference in gradients.items():
        assert difference < 1e-4, weight
