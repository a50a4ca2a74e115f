"""Bad input: exit status 2, exactly one clear line, and nothing written under --save."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from sample_run import write_recipe, write_sample_data

import pretrain_laver
from integration.harness import REPOSITORY, environment, python

# What a recipe or a command line alone gives away: refused before torch is imported.
# Extra arguments -> words of the line. {d} is the folder of the sample data.
COMMAND_LINES: dict[str, tuple[str, str]] = {
    "unknown_flag": (
        "--global-batch-sizes 8",
        "unknown flag --global-batch-sizes; did you mean --global-batch-size?",
    ),
    "unknown_flag_with_value": ("--mask_ration=0.5", "did you mean --mask-ratio?"),
    "wrong_type": ("--train-iters many", "--train-iters: invalid literal for int() with base 10: 'many'"),
    "unknown_choice": (
        "--gram cgaa",
        "invalid choice 'cgaa' for argument '--gram'. Expected one of ('cga', 'ga', 'off')",
    ),
    "missing_value": ("--system-prompt", "Missing value for argument '--system-prompt'"),
    "too_few_values": ("--mrope-section 1 2", "--mrope-section"),
    "stray_word": ("8", "unexpected argument '8'"),
    "indivisible_heads": (
        "--tensor-model-parallel-size 3",
        "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3; use 1 or 2",
    ),
    "indivisible_groups": (
        "--tensor-model-parallel-size 4",
        "num_query_groups=2 is not divisible by tensor_model_parallel_size=4; use 1 or 2",
    ),
    "indivisible_layers": (
        "--pipeline-model-parallel-size 3",
        "num_layers=4 is not divisible by 3 pipeline chunks",
    ),
    "indivisible_chunks": (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
        "num_layers=4 is not divisible by 6 pipeline chunks",
    ),
    "context_parallel_heads": (
        "--context-parallel-size 3",
        "context_parallel_size=3 cannot share 4 query and 2 key/value heads of each tensor-parallel rank evenly; "
        "use 1, 2, 4",
    ),
    "nothing_trains": ("--trainable", "trainable is empty, so nothing would train"),
    "param_gather_alone": (
        "--overlap-param-gather",
        "needs use_distributed_optimizer and overlap_grad_reduce",
    ),
    "sequence_parallel_alone": ("--sequence-parallel", "needs tensor_model_parallel_size > 1"),
    "unknown_preset": ("--model qwen2.5-8b", "'qwen2.5-8b' is no preset; did you mean 'qwen2.5-"),
    "mask_ratio_out_of_range": ("--mask-ratio 1.5", "mask_ratio=1.5 is not between 0 and 1"),
    "tower_without_directory": ("--vision clip", "vision=clip needs vision_path"),
    "two_starting_points": ("--load {d} --pretrained-checkpoint {d}", "give one of them"),
    "missing_recipe": ("--config {d}/nowhere.yaml", "nowhere.yaml does not exist"),
    "hf_path_missing": ("--hf-path {d}/nowhere", "nowhere/config.json: no such file"),
}

# Recipes that are wrong by themselves -> words of the line.
RECIPES: dict[str, tuple[str, str]] = {
    "unknown_key": ("laver: {mask_ration: 0.5}", "unknown key laver.mask_ration; did you mean 'mask_ratio'?"),
    "unknown_section": ("optimiser: {lr: 1.0e-3}", "unknown section 'optimiser'; did you mean 'optimizer'?"),
    "unknown_value": ("laver: {gram: cgaa}", "laver.gram='cgaa': input should be 'cga', 'ga' or 'off'"),
    "wrong_type": ("train: {train_iters: many}", "train.train_iters='many': input should be a valid integer"),
    "section_is_no_mapping": ("train: [1, 2]", "section train must be a mapping, got list"),
    "not_yaml": ("train: {train_iters: 1", "is not valid YAML"),
    "a_list": ("[1, 2]", "must be a mapping of sections, got list"),
    "missing_base": ("base: nowhere.yaml", "nowhere.yaml does not exist"),
}

# What only shows in data, tokenizer, checkpoint or model: refused inside the process group.
RUNS: dict[str, tuple[str, str]] = {
    "world_size": ("--tensor-model-parallel-size 2", "world size 1 is not divisible by"),
    "indivisible_batch": ("--micro-batch-size 3", "global_batch_size=4 is not divisible by"),
    "missing_data": ("--data-path {d}/nowhere.json", "nowhere.json: no such file"),
    "missing_image": ("--data-path {d}/missing_image.json", "gone.png' does not exist"),
    "broken_json": ("--data-path {d}/broken.json", "broken.json:3: broken JSON at column"),
    "broken_jsonl": ("--data-path {d}/broken.jsonl", "broken.jsonl:2: broken JSON at column"),
    "placeholders_disagree": (
        "--data-path {d}/placeholders.json",
        "2 <image> placeholder(s) in the user turns but 1",
    ),
    "too_long": ("--seq-length 32", "tokens, more than seq_length=32; raise seq_length to"),
    "missing_tokenizer": ("--tokenizer-model {d}/nowhere.model", "nowhere.model: no tokenizer"),
    "vocabulary_too_small": ("--vocab-size 32", "the tokenizer has 96 tokens"),
    "wrong_vision_tower": (
        "--vision clip --vision-path {d}/tower",
        "config.json: model_type='llama', wanted",
    ),
    "tower_of_another_kind": (
        "--vision clip --vision-path {d}/siglip --vision-random-init",
        "model_type='siglip_vision_model', wanted 'clip' or 'clip_vision_model'; set vision to 'siglip'",
    ),
    "wrong_native_tower": (
        "--vision qwen2-vl --vision-path {d}/qwen",
        "model_type='llama', wanted 'qwen2_vl'",
    ),
    "native_tower_without_config": (
        "--vision aimv2 --vision-path {d}/headless",
        "headless/config.json: no such file",
    ),
    "missing_vision_tower": (
        "--vision siglip --vision-path {d}/nowhere",
        "no such file; give a Hugging Face directory for vision_path",
    ),
    "trainable_matches_nothing": (
        "--trainable conector.*",
        "trainable pattern 'conector.*' matches no parameter",
    ),
    "load_missing": ("--load {d}/nowhere", "load={d}/nowhere does not exist"),
    "load_of_another_model": (
        "--load {d}/trained --num-layers 2",
        "another recipe (model.num_layers was 4, now 2)",
    ),
    "load_of_another_seed": ("--load {d}/trained --seed 1", "another recipe (train.seed was 1234, now 1)"),
    "weights_missing": ("--pretrained-checkpoint {d}/nowhere", "nowhere holds no checkpoint"),
    "weights_of_another_model": (
        "--pretrained-checkpoint {d}/trained --hidden-size 32",
        "hidden_size=32, but {d}/trained has 64; leave hidden_size out",
    ),
    "save_of_another_recipe": (
        "--save {d}/trained --lr 1",
        "another recipe (optimizer.lr was 0.001, now 1.0)",
    ),
    "save_without_load": ("--save {d}/trained", "already holds a run; resume it with --load"),
    "save_is_a_file": ("--save {d}/train.json", "train.json is a file; choose a folder"),
}
# What an optional library is needed for, where it is missing.
OPTIONAL: dict[str, tuple[str, str]] = {
    "triton": ("--kernels triton", "kernels: impl='triton' is not installed (pip install"),
    "wandb": ("--wandb-project mine", "wandb_project needs Weights & Biases; `pip install wandb`"),
    "transformer_engine": ("--transformer-impl transformer_engine", "but it is not installed here"),
}
RUNS |= {f"no_{name}": row for name, row in OPTIONAL.items() if importlib.util.find_spec(name) is None}
DRY_RUNS = (
    "indivisible_batch",
    "missing_image",
    "wrong_vision_tower",
    "trainable_matches_nothing",
    "save_without_load",
)

# Calls `main` once per line of the plan and notes (status, standard error as the process wrote it).
WORKER = """
import json, os, sys, tempfile, warnings
warnings.filterwarnings("ignore")
import pretrain_laver
results = []
terminal = os.dup(2)
for argv in json.load(open(sys.argv[1])):
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            status = pretrain_laver.main(argv)
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
    assert lines[0].startswith("pretrain_laver.py: error: ")
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
    status = pretrain_laver.main(argv)
    assert_refused(Refusal(status, capsys.readouterr().err, files_under(save)), words)


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(case, tmp_path, capsys):
    text, words = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    save = tmp_path / "save"
    status = pretrain_laver.main(["--config", str(tmp_path / "recipe.yaml"), "--save", str(save)])
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
