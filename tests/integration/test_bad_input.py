"""Bad input: exit status 2, exactly one clear line, and nothing written under --save."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from sample_run import write_recipe, write_sample_data

from integration.bad_input_cases import COMMAND_LINES, DRY_RUNS, RECIPES, RUNS
from integration.harness import REPOSITORY, environment, python
from laver_mcore.cli import train

# Calls `main` once per line of the plan and notes (status, standard error as the process wrote it).
WORKER = """
import json, os, sys, tempfile
from laver_mcore.cli import train
from laver_mcore.cli.console import silence_libraries
silence_libraries()
results = []
terminal = os.dup(2)
for argv in json.load(open(sys.argv[1])):
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            status = train.main(argv)
        except BaseException as error:
            status = repr(error)
        sys.stderr.flush()
        os.dup2(terminal, 2)
        file.seek(0)
        results.append((status, file.read().decode()))
json.dump(results, open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Refusal:
    """How one command line ended, and what it left under its `--save`."""

    status: int | str
    stderr: str
    left: list[str]


def assert_refused(refusal: Refusal, words: str) -> None:
    assert refusal.status == 2, refusal
    lines = refusal.stderr.splitlines()
    assert len(lines) == 1, refusal.stderr
    assert ": error: " in lines[0]
    assert words in lines[0]
    assert refusal.left == []


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_bad_data(directory: Path) -> None:
    records = json.loads((directory / "train.json").read_text(encoding="utf-8"))
    with_image = next(record for record in records if isinstance(record.get("image"), str))
    human, gpt = with_image["conversations"]
    twice = {**with_image, "conversations": [{**human, "value": f"<image> {human['value']}"}, gpt]}
    for name, record in (("missing_image", {**with_image, "image": "gone.png"}), ("placeholders", twice)):
        (directory / f"{name}.json").write_text(json.dumps([record]), encoding="utf-8")
    one = json.dumps(with_image)
    (directory / "broken.json").write_text(f"[\n{one},\n{one[:-5]}\n]", encoding="utf-8")
    (directory / "broken.jsonl").write_text(f"{one}\n{one[:-5]}\n", encoding="utf-8")
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 32, "image_size": 32, "patch_size": 8}
    fixed = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    native = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    towers: dict[str, tuple[dict | None, dict]] = {
        "tower": ({"model_type": "llama"}, fixed),
        "siglip": (siglip, fixed),
        "qwen": ({"model_type": "llama"}, native),
        "headless": (None, native),
    }
    for name, (config, pixels) in towers.items():
        (directory / name).mkdir()
        (directory / name / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
        if config is not None:
            (directory / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_sample_data(folder, num_samples=12)
    write_recipe(folder)
    write_bad_data(folder)
    return folder


@pytest.fixture(scope="module")
def refusals(directory):
    """Every command line of `RUNS` (and some as dry runs), in one process, after one good run of one step."""
    recipe = ["--config", str(directory / "recipe.yaml"), "--no-tensorboard"]
    plan = {"trained": [*recipe, "--save", str(directory / "trained"), "--train-iters", "1"]}
    for name, (extra, _) in RUNS.items():
        own = extra.format(d=directory).split()
        save = [] if "--save" in own else ["--save", str(directory / "saves" / name)]
        plan[name] = [*recipe, "--train-iters", "1", *save, *own]
    for name in DRY_RUNS:
        plan[f"{name}, dry"] = ["--dry-run", *(word.replace("/saves/", "/dry_saves/") for word in plan[name])]
    (directory / "plan.json").write_text(json.dumps(list(plan.values())), encoding="utf-8")
    command = [sys.executable, "-c", WORKER, str(directory / "plan.json"), str(directory / "results.json")]
    subprocess.run(
        command, check=True, cwd=REPOSITORY, env=environment(), timeout=240, stdout=subprocess.DEVNULL
    )
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert results[0][0] == 0, results[0]
    refusals = {}
    for (name, argv), (status, stderr) in zip(plan.items(), results, strict=True):
        folder = Path(argv[argv.index("--save") + 1])
        left = [] if folder.name == "trained" else files_under(folder)
        refusals[name] = Refusal(status, stderr, left)
    return refusals


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_command_line(case, directory, tmp_path, capsys):
    extra, words = COMMAND_LINES[case]
    save = tmp_path / "save"
    argv = f"--config {directory}/recipe.yaml --save {save} {extra.format(d=directory)}".split()
    status = train.main(argv)
    assert_refused(Refusal(status, capsys.readouterr().err, files_under(save)), words)


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(case, tmp_path, capsys):
    text, words = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    save = tmp_path / "save"
    status = train.main(["--config", str(tmp_path / "recipe.yaml"), "--save", str(save)])
    assert_refused(Refusal(status, capsys.readouterr().err, files_under(save)), words)


@pytest.mark.parametrize("case", RUNS)
def test_run(case, directory, refusals):
    assert_refused(refusals[case], RUNS[case][1].format(d=directory))


@pytest.mark.parametrize("case", DRY_RUNS)
def test_dry_run_refuses_the_same(case, directory, refusals):
    assert_refused(refusals[f"{case}, dry"], RUNS[case][1].format(d=directory))


def test_a_refused_save_folder_is_left_alone(directory, refusals):
    assert refusals["save_of_another_recipe"].status == 2
    found = files_under(directory / "trained")
    assert [name for name in found if "/" not in name] == [
        "config.yaml",
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
    ]
    assert len((directory / "trained" / "metrics.jsonl").read_text().splitlines()) == 1
    assert "lr: 0.001" in (directory / "trained" / "config.yaml").read_text()


def test_exit_status_of_the_program(directory, tmp_path):
    """The whole program once, as a user starts it."""
    flags = (
        f"--config {directory}/recipe.yaml --save {tmp_path}/save --data-path {directory}/missing_image.json"
    )
    done = python("pretrain_laver.py", *flags.split(), timeout=120)
    assert_refused(Refusal(done.returncode, done.stderr, files_under(tmp_path)), RUNS["missing_image"][1])
