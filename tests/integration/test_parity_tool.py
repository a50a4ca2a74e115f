"""tools/check_parity.py: agreement at every layout, the divergent layer named, exit statuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, python, run_scenarios
from laver_mcore.cli.parity import main
from laver_mcore.convert.export import export_run


def check(*argv):
    return python("tools/check_parity.py", *map(str, argv), timeout=150)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=131,
        initializer_range=0.1,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("laver")
    write_sample_data(directory, num_samples=8)
    recipe = write_recipe(directory)
    run_scenarios(1, directory, [Scenario(name="run", argv=("--config", str(recipe), "--train-iters", "1"))])
    export_run(directory / "run", directory / "hf")
    return directory


def test_text_directory_agrees_and_reports(qwen, tmp_path):
    done = check("--hf-path", qwen, "--tensor-model-parallel-size", 2, "--report", tmp_path / "parity.md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("text: largest difference ")
    assert "no layer diverges" in done.stdout
    text = (tmp_path / "parity.md").read_text()
    assert "text: agree" in text
    assert "- layout: TP 2 x PP 1" in text
    assert text.count("\n| ") == 5  # a heading and four layers


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_exported_run_agrees_on_images(run, layout):
    done = check("--hf-path", run / "hf", "--load", run / "run", "--trust-remote-code", layout, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["text", "one image", "two images"]


def test_divergent_layer_is_named(run, tmp_path, capsys):
    spoiled = tmp_path / "hf"
    spoiled.mkdir()
    for file in (run / "hf").iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    weights = load_file(spoiled / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] += 0.05
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    assert main(["--hf-path", str(spoiled), "--load", str(run / "run"), "--trust-remote-code"]) == 1
    assert capsys.readouterr().out.count("first divergent layer 2") == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--hf-path", "{run}/nowhere"), "config.json: no such file"),
        (("--hf-path", "{run}/hf"), "is an exported run; give the run itself with --load"),
        (("--hf-path", "{run}/hf", "--load", "{run}/run"), "read it and give --trust-remote-code"),
        (("--hf-path", "{run}/hf", "--load", "{run}/hf"), "holds no checkpoint"),
    ],
    ids=["no directory", "no run", "no trust", "no checkpoint"],
)
def test_bad_input_is_one_line(run, capsys, argv, message):
    assert main([part.format(run=run) for part in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
