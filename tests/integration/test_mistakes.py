"""What people type wrong at each command: one line that names it, exit status 2 (1 for bad data), no traceback."""

import json
import os

import pytest
from sample_run import write_recipe, write_sample_data

from laver_mcore.cli import main as cli
from laver_mcore.config.load import parse, to_yaml

# Command line -> words of the line. `{d}` is a folder with `recipe.yaml`, its data, a run without checkpoint (`run`),
# an empty folder (`empty`), a text file (`file`), and a directory with half a model (`half`).
MISTAKES = {
    "chat --model {d}/nowhere": "nowhere has no config.json",
    "chat --model {d}/empty --prompt hi": "empty has no config.json",
    "chat --model {d}/half --prompt hi": "half",
    "chat --model {d}/half --image {d}/file --prompt hi": "file: not an image that can be decoded",
    "chat --model {d}/half --image {d}/nowhere.png": "nowhere.png: no such file",
    "chat --model {d}/half --max-new-tokens none": "argument --max-new-tokens: invalid int value: 'none'",
    "convert --hf-path {d}/nowhere --save {d}/out": "nowhere",
    "convert --hf-path {d}/empty --save {d}/out": "config.json: no such file",
    "convert --hf-path {d}/half --save {d}/out": "half",
    "convert --hf-path {d}/half --save {d}/file": "argument --save: {d}/file is a file; give a folder",
    "convert --hf-path {d}/half --save {d}/out --dtype int8": "invalid choice: 'int8'",
    "export --load {d}/nowhere --save {d}/out": "nowhere",
    "export --load {d}/empty --save {d}/out": "empty",
    "export --load {d}/run --save {d}/out --form onnx": "invalid choice: 'onnx'",
    "export --load {d}/run": "the following arguments are required: --save",
    "inspect {d}/nowhere": "nowhere holds no checkpoint",
    "inspect {d}/run": "run holds no checkpoint",
    "inspect": "the following arguments are required: DIR",
    "inspect-data {d}/nowhere.yaml --output {d}/x.html": "recipe {d}/nowhere.yaml does not exist",
    "inspect-data {d}/recipe.yaml": "the following arguments are required: --output",
    "inspect-data {d}/recipe.yaml --output {d}/no/x.html": "argument --output: {d}/no/x.html: its folder does not",
    "inspect-data {d}/recipe.yaml --output {d}": "is a folder; give a file",
    "inspect-data {d}/recipe.yaml --output {d}/x.html --step -1": "--step -1 is not at least 0",
    "inspect-data {d}/recipe.yaml --output {d}/x.html --data-path {d}/gone.json": "gone.json: no such file",
    "parity --hf-path {d}/nowhere": "nowhere/config.json: no such file",
    "parity --hf-path {d}/half": "half",
    "parity --hf-path {d}/half --report {d}/no/x.md": "argument --report: {d}/no/x.md: its folder does not exist",
    "answer --checkpoint {d}/nowhere --data {d}/train.json": "recipe {d}/nowhere/config.yaml does not exist",
    "answer --checkpoint {d}/run --data {d}/gone.json": "gone.json: no such file",
    "answer --checkpoint {d}/run --data {d}/file": "file",
    "answer --checkpoint {d}/run --data {d}/train.json": "run",
    "answer --data {d}/train.json": "the following arguments are required: --checkpoint",
    "diagnose --model {d}/nowhere --data {d}/train.json": "nowhere",
    "diagnose --model {d}/run --data {d}/gone.json": "gone.json: no such file",
    "diagnose --model {d}/run --data {d}/train.json --num-questions 0": "two are needed",
    "diagnose --model {d}/run --data {d}/train.json --output {d}/file": "argument --output: {d}/file is a file",
    "diagnose --model {d}/run --data {d}/train.json --encoder {d}/empty": "empty has no config.json",
    "report {d}/nowhere": "nowhere holds no metrics.jsonl",
    "report {d}/run": "run holds no metrics.jsonl",
    "plan {d}/recipe.yaml --gpus 0 --gpu a100-80gb": "gpus=0 must be at least 1",
    "plan {d}/recipe.yaml --gpus many --gpu a100-80gb": "argument --gpus: invalid int value: 'many'",
    "plan {d}/recipe.yaml --gpus 8 --gpu v100": "invalid choice: 'v100'",
    "plan {d}/recipe.yaml --gpus 8": "the following arguments are required: --gpu",
    "plan {d}/recipe.yaml --gpus 8 --gpu a100-80gb --json {d}/no/x.json": "its folder does not exist",
    "prepare --output {d}/out": "give --input and --format, or --check",
    "prepare --input {d}/gone.json --format llava --output {d}/out": "gone.json",
    "prepare --input {d}/train.json --format lava --output {d}/out": "invalid choice: 'lava'",
    "prepare --input {d}/file --format llava --output {d}/out": "file",
    "prepare --input {d}/empty --format finevision --output {d}/out": "empty",
    "prepare --input {d}/train.json --format llava --output {d}/file": "argument --output: {d}/file is a file",
    "prepare --input {d}/train.json --format llava --output {d}/out --num-samples 0": "--num-samples 0 is not at",
    "prepare --input {d}/train.json --format llava --output {d}/out --workers 0": "--workers 0 is not at least 1",
    "prepare --input {d}/train.json --format llava --output {d}/out --max-bad-fraction 2": "is not between 0 and 1",
    "prepare-targets {d}/recipe.yaml --output {d}/out": "the recipe has no frozen encoder",
    "prepare-targets {d}/recipe.yaml --output {d}/out --part 3/2": "is not I/N with I from 0 to N - 1",
    "prepare --input {d}/train.json --format llava --output {d}/out --max-aspect nan": "--max-aspect nan is not at",
    "train {d}/recipe.yaml --config {d}/recipe.yaml": "two recipes, {d}/recipe.yaml and --config",
    "train --hidden-size": "--hidden-size",
    "trian {d}/recipe.yaml": "no command 'trian'",
}
ENVIRONMENT = {
    "WORLD_SIZE=2": "WORLD_SIZE=2",
    "RANK=1": "RANK=1",
    "RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=abc": "MASTER_PORT='abc'",
    "RANK=3 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1": "RANK=3",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_sample_data(folder, num_samples=12)
    config, _ = parse(["--config", str(write_recipe(folder))])
    for name in ("empty", "half", "run"):
        (folder / name).mkdir()
    (folder / "file").write_text("neither JSON nor a picture")
    (folder / "half" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def typed(directory, capfd, monkeypatch):
    """Runs one command; returns (exit status, lines of standard error as the process wrote them)."""
    monkeypatch.setattr("sys.argv", ["laver"])  # which the command changes

    def run(line):
        try:
            status = cli.main(line.format(d=directory).split())
        except SystemExit as left:
            status = left.code
        return status, capfd.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line, typed, directory):
    status, said = typed(line)
    assert status in (1, 2) and len(said) == 1, said
    assert said[0].startswith("laver")
    assert MISTAKES[line].format(d=directory) in said[0]
    assert not (directory / "out").exists()


@pytest.mark.parametrize("variables", ENVIRONMENT)
def test_variables_of_another_job_are_one_line(variables, typed, directory, monkeypatch):
    if "RANK=0" not in variables.split() and "RANK" in variables:
        monkeypatch.setattr("time.sleep", lambda _: None)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    status, said = typed("train {d}/recipe.yaml")
    assert status == 2
    if os.environ.get("RANK", "0") == "0":  # the others leave it to the first
        assert len(said) == 1 and ENVIRONMENT[variables] in said[0]
