"""The decoder of docs/extending.md, installed as a package: read, trained and written, equal to transformers'."""

import json

import pytest
import torch
from long import LONG
from safetensors.torch import load_file
from sample_run import write_recipe, write_sample_data
from sample_tokenizers import write_tokenizer_of
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from integration.harness import REPOSITORY, python, read_metrics, torchrun
from integration.test_objective_by_entry_point import path_with

FRESH = "--num-layers None --hidden-size None --ffn-hidden-size None --seq-length 512"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mistral")
    write_sample_data(directory, num_samples=16)
    write_recipe(directory)
    package = directory / "installed" / "toy-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[laver_mcore.decoders]\nmistral = toy_decoder:MISTRAL\n")
    page = (REPOSITORY / "docs" / "extending.md").read_text().split("## A decoder")[1]
    (package.parent / "toy_decoder.py").write_text(page.split("```python\n")[1].split("```")[0])
    write_tokenizer_of(directory / "hf", "vicuna")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(directory / "hf")),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=None,
        initializer_range=0.1,
    )
    MistralForCausalLM(config).save_pretrained(directory / "hf")
    return directory


def run(directory, *argv, ranks=1):
    start = python if ranks == 1 else lambda *a, **v: torchrun(ranks, *a, **v)
    return start(*argv, PYTHONPATH=path_with(directory / "installed"))


def train(directory, name, flags, ranks=1):
    argv = (
        f"pretrain_laver.py --config {directory}/recipe.yaml --train-iters 2 --no-tensorboard {FRESH} {flags}"
    )
    argv += f" --hf-path {directory}/hf --tokenizer-model {directory}/hf --save {directory}/{name}"
    return run(directory, *argv.split(), ranks=ranks)


def test_it_computes_what_transformers_does(directory):
    done = run(directory, "tools/check_parity.py", "--hf-path", str(directory / "hf"), "--tolerance", "1e-4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@LONG
def test_it_trains_under_layouts_and_comes_out_as_it_was(directory):
    for name, flags, ranks in (
        ("tp1", "", 1),
        ("tp2_sp", "--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("still", "--lr 0", 1),
    ):
        done = train(directory, name, flags, ranks)
        assert done.returncode == 0, done.stderr[-4000:]
    for got, wanted in zip(read_metrics(directory / "tp2_sp"), read_metrics(directory / "tp1"), strict=True):
        assert got["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=2e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-5)
    export = ["tools/mcore_to_hf.py", "--load", str(directory / "still"), "--save", str(directory / "back")]
    done = run(directory, *export, "--decoder-only")
    assert done.returncode == 0, done.stderr[-4000:]
    before, after = (load_file(directory / name / "model.safetensors") for name in ("hf", "back"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), (
            name
        )  # three rows more for the tokens of vision
    assert json.loads((directory / "back" / "config.json").read_text())["architectures"] == [
        "MistralForCausalLM"
    ]


def test_its_window_is_refused(directory):
    config = json.loads((directory / "hf" / "config.json").read_text())
    (directory / "hf" / "config.json").write_text(json.dumps({**config, "sliding_window": 4096}))
    done = train(directory, "refused", "")
    (directory / "hf" / "config.json").write_text(json.dumps(config))
    assert done.returncode == 2
    assert "sliding-window attention (sliding_window=4096) is not supported" in done.stderr
    assert done.stderr.count("\n") == 1
