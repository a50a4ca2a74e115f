"""The papers' recipes, read as they are, take two steps on tiny random parts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sample_decoders import random_decoder
from sample_tokenizers import write_tokenizer_of
from transformers import AutoTokenizer

from integration.harness import REPOSITORY, Scenario, read_metrics, run_scenarios
from integration.test_methods import write_target
from laver_mcore.convert.decoder import open_run
from laver_mcore.convert.export import export_run
from laver_mcore.data.records.sample import Turn
from laver_mcore.data.sequence.prompt import encode_prompt
from laver_mcore.train.build import build_tokenizer

# Recipe -> flags that make its objective's parts small, losses beside the language model's.
RECIPES = {
    "qwen2.5-7b-siglip2/stage1": ("", ()),
    "qwen2.5-7b-siglip2/stage2": ("--vision-head-hidden-size 32", ("mim_loss", "gram_loss")),
    "qwen2.5-7b-siglip2/stage3": ("", ()),
    "victor-qwen2.5-7b-siglip2/stage1": ("", ()),
    "victor-qwen2.5-7b-siglip2/stage1.5": ("--pool-size 64", ("reconstruction_loss",)),
    "victor-qwen2.5-7b-siglip2/stage2": ("", ()),
    "qwen3-8b-siglip2/stage1": ("", ()),
    "qwen3-8b-siglip2/stage2": ("--vision-head-hidden-size 32", ("mim_loss", "gram_loss")),
    "qwen3-8b-siglip2/stage3": ("", ()),
    "victor-vicuna-7b-clip/stage1": ("", ()),
    "victor-vicuna-7b-clip/stage1.5": ("--pool-size 64", ("reconstruction_loss",)),
    "victor-vicuna-7b-clip/stage2": ("", ()),
    "victor-llama3.1-8b-siglip2/stage1": ("", ()),
    "victor-llama3.1-8b-siglip2/stage1.5": ("--pool-size 64", ("reconstruction_loss",)),
    "victor-llama3.1-8b-siglip2/stage2": ("", ()),
    "viral-vicuna-7b-clip/stage1": ("", ()),
    "viral-vicuna-7b-clip/stage2": (
        "--target-path {tower} --target-layers 2 --projector-hidden-size 16 --lora-rank 4",
        ("alignment_loss",),
    ),
    "viral-qwen2.5-7b-clip/stage1": ("", ()),
    "viral-qwen2.5-7b-clip/stage2": (
        "--target-path {tower} --target-layers 2 --projector-hidden-size 16",
        ("alignment_loss",),
    ),
}
TINY = """
    --vision {kind} --vision-path {tower} --vision-random-init --data-path {data}/train.json --image-folder {data}
    --pad-to-multiple 16 --global-batch-size 4 --train-iters 2
    --tensor-model-parallel-size 1 --no-sequence-parallel --log-interval 1 --save-interval None
"""
QWEN2_5 = """
    --model tiny --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --hf-path None
    --tokenizer-model {data}/tokenizer.model --seq-length 128
"""
# Others start from a directory of their own family, with its kind of tokenizer: decoder, tokenizer.
DECODERS = {
    "qwen3-8b": ("qwen3", "qwen3"),
    "vicuna-7b": ("vicuna", "vicuna"),
    "llama3.1-8b": ("llama3.1", "llama3.1"),
}
OTHER = "--hf-path {decoder} --tokenizer-model {decoder} --seq-length 1024"


@pytest.fixture(scope="module")
def runs(data_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipes")
    tower = directory / "tower"
    write_target(tower)
    for kind, (decoder, tokenizer) in DECODERS.items():
        write_tokenizer_of(directory / kind, tokenizer)
        own = len(AutoTokenizer.from_pretrained(directory / kind))
        random_decoder(decoder, vocab_size=own, std=0.02).save_pretrained(directory / kind)
    scenarios = []
    for name, (smaller, _) in RECIPES.items():
        kind = next((kind for kind in DECODERS if kind in name), None)
        model = QWEN2_5 if kind is None else OTHER
        flags = f"{TINY} {model} {smaller}".format(
            kind="dinov2", tower=tower, data=data_directory, decoder=directory / str(kind)
        )
        recipe = REPOSITORY / "examples" / f"{name}.yaml"
        scenarios.append(
            Scenario(name=name.replace("/", "-"), argv=("--config", str(recipe), *flags.split()))
        )
    run_scenarios(1, directory, scenarios)
    return directory


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(runs: Path, name):
    rows = read_metrics(runs / name.replace("/", "-"))
    assert len(rows) == 2
    assert all(row["lm_loss"] > 0 and row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    losses = {key for key in rows[0] if key.endswith("_loss")} - {"lm_loss"}
    assert losses == set(RECIPES[name][1])


NEEDS_ROWS = {"qwen3-8b": 0, "vicuna-7b": 3, "llama3.1-8b": 3}
"""Tokens for vision that the tokenizers of the table lack: Qwen's has them."""


@pytest.mark.parametrize("kind", NEEDS_ROWS)
def test_the_decoder_comes_out_as_transformers_has_it(runs: Path, kind, tmp_path):
    """Family, shape and chat template, with rows for the tokens that were added, each the mean of the old ones."""
    name = next(name for name in RECIPES if kind in name and name.endswith("stage1"))  # the decoder is frozen
    export_run(runs / name.replace("/", "-"), tmp_path / "whole")
    said = json.loads((tmp_path / "whole" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    before = json.loads((runs / kind / "config.json").read_text())
    assert said["text_config"]["model_type"] == before["model_type"]
    assert said["text_config"]["vocab_size"] == before["vocab_size"] + NEEDS_ROWS[kind]
    assert (
        said["image_token_id"]
        == tokenizer.convert_tokens_to_ids("<|image_pad|>")
        < said["text_config"]["vocab_size"]
    )
    after, old = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
        for folder in (tmp_path / "whole", runs / kind)
    )
    torch.testing.assert_close(after[: len(old)], old.bfloat16().float(), atol=0, rtol=0)
    for row in after[len(old) :]:
        torch.testing.assert_close(row, old.mean(0), atol=1e-3, rtol=0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    config, _ = open_run(runs / name.replace("/", "-"))
    ours = build_tokenizer(config)
    turns = [Turn("user", "<image>\nred?")]
    prompt = encode_prompt(turns, [(1, 1)], ours, system_prompt=config.data.system_prompt)
    assert tokenizer.encode(written, add_special_tokens=False) == prompt.token_ids_L.tolist()
