"""Runs that compute what LLaVA does, exported as it: transformers' own class gives the engine's logits and answers."""

import json
import subprocess
import sys

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, run_scenarios
from integration.test_export import assert_answers_as_the_engine, write_tower
from laver_mcore.convert.decoder import open_run
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.export import export_run
from laver_mcore.convert.llava import differences

PLAIN = "--objective lm --no-mixed-attention --no-rope-2d --vision-random-init"
CASES = {
    "clip": "--vision clip --vision-path {directory}/clip --vision-layer -2",
    "siglip": "--vision siglip --vision-path {directory}/siglip --vision-layer -2",
    "qwen3": "--vision clip --vision-path {directory}/clip --vision-layer -2 --family qwen3",
    "llama3.1": "--vision clip --vision-path {directory}/clip --family llama --rope-scaling 8 1 4 16",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava")
    write_sample_data(directory, num_samples=16)
    recipe = write_recipe(directory)
    for kind in ("clip", "siglip"):
        write_tower(directory / kind, kind)
    trains = "--trainable vision_encoder.* connector.* language_model.*"
    base = f"--config {recipe} --train-iters 4 --lr 1e-2 {trains} {PLAIN}"
    runs = [
        Scenario(name=f"run-{name}", argv=tuple(f"{base} {flags.format(directory=directory)}".split()))
        for name, flags in CASES.items()
    ]
    run_scenarios(1, directory, runs)
    for name in CASES:
        assert export_run(directory / f"run-{name}", directory / f"hf-{name}", form="llava") == []
    return directory


@pytest.mark.parametrize("name", CASES)
def test_transformers_own_llava_answers_as_the_engine_does(directory, name):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, loading = LlavaForConditionalGeneration.from_pretrained(
        directory / f"hf-{name}", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    model.eval()
    processor = LlavaProcessor.from_pretrained(directory / f"hf-{name}")
    assert_answers_as_the_engine(directory, name, model, processor, pixel_tolerance=1e-6)


REFUSED = {
    "mixed": ("--mixed-attention", "mixed attention (--no-mixed-attention)"),
    "positions": ("--rope-2d", "2D positions (--no-rope-2d)"),
    "siglip": (
        "--vision siglip --vision-layer -1",
        "SigLIP read behind its final norm (--vision-layer -2)",
    ),
    "encoder-free": ("--vision encoder-free", "encoder-free images (--vision clip or siglip)"),
    "unit length": ("--normalize-visual-tokens True", "visual tokens of unit length (ViCToR)"),
    "connector": ("--connector-hidden-size 48", "connector of width 48 (--connector-hidden-size 64)"),
    "heads": ("--kv-channels 32", "heads of width 32 (--kv-channels 16)"),
    "cls": ("--vision-select cls_patch", "CLS token among the visual ones (--vision-select patch)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llava_does_not_compute_is_named(directory, name):
    from laver_mcore.config.load import parse

    flags, words = REFUSED[name]
    data = f"--data-path {directory}/train.json --tokenizer-model {directory}/tokenizer.model"
    argv = f"--config {directory}/recipe.yaml {PLAIN} --vision clip --vision-path {directory}/clip {data} {flags}"
    config, _ = parse(argv.split())
    assert words in differences(config)


def test_the_exporter_says_who_loads_what_it_wrote(directory, tmp_path):
    """The tool's own words, for a run that LLaVA is and for one that it is not."""
    recipe = open_run(directory / "run-clip")[0]
    assert differences(recipe) == []
    argv = f"--config {directory}/recipe.yaml --train-iters 1".split()
    run_scenarios(1, directory, [Scenario(name="run-mixed", argv=tuple(argv))])
    with pytest.raises(
        ConversionError, match=r"LLaVA has no mixed attention .*; no 2D positions .*; no encoder-free"
    ):
        export_run(directory / "run-mixed", tmp_path / "refused", form="llava")
    assert not (tmp_path / "refused").exists()
    command = [sys.executable, "tools/mcore_to_hf.py", "--load", str(directory / "run-mixed")]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "own")], capture_output=True, text=True, check=True
    )
    assert "transformers alone loads it: vLLM, SGLang and llama.cpp have no mixed attention" in done.stdout
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model_type"] == "laver"
