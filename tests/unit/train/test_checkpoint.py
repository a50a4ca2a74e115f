"""All that a resume needs, saved from one engine and loaded into another; what may not be loaded or overwritten."""

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sample_run import WORDS, write_recipe, write_sample_data, write_tokenizer

from laver_mcore.cli.run import check_save_folder, skip_ahead
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse, to_yaml
from laver_mcore.convert.export import export_run
from laver_mcore.data.sequence.tokenizer import load_tokenizer
from laver_mcore.megatron import parallel
from laver_mcore.megatron.checkpoints import CheckpointError, may_start
from laver_mcore.train import checkpoint
from laver_mcore.train.build import build_data, build_engine, build_tokenizer, resolve_vocab_size
from laver_mcore.train.checkpoint import Progress
from laver_mcore.train.loop import RunState, _after, _data_start
from laver_mcore.train.saved_weights import check_trained_with
from laver_mcore.train.step import train_step

STEPS = 3
FINGERPRINT = "these data"


def written(path, text):
    path.mkdir(parents=True, exist_ok=True)
    (path / "latest_checkpointed_iteration.txt").write_text(text)
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_sample_data(directory, num_samples=12)
    return write_recipe(directory)


@pytest.fixture(scope="module")
def device():
    warnings.filterwarnings("ignore")
    joined = dist.is_initialized()
    yield parallel.init_distributed()
    if not joined:
        parallel.shut_down()


@pytest.fixture(autouse=True)
def no_group_is_left():
    """Every engine makes groups of its own, and each of them threads that slow all that follows."""
    yield
    if dist.is_initialized():
        parallel.forget_groups()


def config_of(recipe, flags=""):
    return parse(["--config", str(recipe), *flags.split()])[0]


def engine_of(config, device):
    topology = parallel.build_topology(config.parallel, device)
    tokenizer = build_tokenizer(config)
    return build_engine(config, topology, resolve_vocab_size(config, tokenizer), tokenizer)[0]


def take_steps(engine, first, last):
    config = engine.config
    data = build_data(config, build_tokenizer(config))
    steps = data.iterate(
        first,
        last,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        image_share=(0, 1),
    )
    for step, batches in zip(range(first, last), steps, strict=True):
        train_step(engine, batches, step)


def state_of(engine):
    """Every tensor that a step reads and writes, by name: weights, averages, centre, moments, step counts."""
    found = {"centre": engine.objective.center_K}
    (chunk,) = engine.chunks
    moments = engine.optimizer.optimizer.state
    for name, parameter in chunk.named_parameters():
        found[name] = parameter.detach()
        if parameter in engine.teacher.averages:
            found[f"teacher of {name}"] = engine.teacher.averages[parameter]
        for key, tensor in moments.get(parameter, {}).items():
            found[f"{key} of {name}"] = tensor
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def saved(recipe, device, tmp_path_factory):
    """A run's folder after three steps, its state there, and its state one step later; the random numbers' too."""
    folder = tmp_path_factory.mktemp("run")
    engine = engine_of(config_of(recipe), device)
    take_steps(engine, 0, STEPS)
    torch.manual_seed(5)
    found = checkpoint.save(engine, folder, Progress(iteration=STEPS, consumed_rows=12), FINGERPRINT)
    assert found == folder / "iter_0000003"
    before, numbers = state_of(engine), torch.rand(4)
    take_steps(engine, STEPS, STEPS + 1)
    return SimpleNamespace(folder=folder, state=before, numbers=numbers, later=state_of(engine))


def test_another_engine_goes_on_from_there(saved, recipe, device):
    """Nothing is compared with what it was before: the second engine starts from other values of everything."""
    assert (saved.folder / "latest_checkpointed_iteration.txt").read_text() == "3"
    engine = engine_of(config_of(recipe), device)
    torch.manual_seed(6)
    with torch.no_grad():
        for tensor in (
            *engine.chunks[0].parameters(),
            *engine.teacher.averages.values(),
            engine.objective.center_K,
        ):
            tensor.fill_(0.5)
    assert checkpoint.load(engine, saved.folder, FINGERPRINT) == Progress(iteration=3, consumed_rows=12)
    found = state_of(engine)
    assert sum(name.startswith("exp_avg of") for name in saved.state) > 20
    assert sum(name.startswith("teacher of") for name in saved.state) > 15
    assert saved.state["centre"].abs().max() > 0
    assert set(found) == set(saved.state)
    for name, tensor in saved.state.items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(torch.rand(4), saved.numbers)
    take_steps(engine, STEPS, STEPS + 1)
    for name, tensor in state_of(engine).items():
        assert torch.equal(tensor, saved.later[name]), name


def test_weights_alone_start_a_run(saved, recipe, device):
    """The teacher starts from them too, not from the saved averages; optimizer and centre start anew."""
    engine = engine_of(config_of(recipe, f"--pretrained-checkpoint {saved.folder}"), device)
    for name, parameter in engine.chunks[0].named_parameters():
        assert torch.equal(parameter, saved.state[name]), name
        if parameter in engine.teacher.averages:
            assert torch.equal(engine.teacher.averages[parameter], parameter.view(-1)), name
    assert not engine.optimizer.optimizer.state
    assert engine.objective.center_K.abs().max() == 0


# Flags of the recipe that loads, its data -> words of the refusal.
REFUSED = {
    "other_data": ("", "other data", "was trained on other data"),
    "other_width": ("--hidden-size 32", FINGERPRINT, "hidden_size=64, this recipe hidden_size=32"),
    "other_depth": ("--num-layers 2", FINGERPRINT, "num_layers=4, this recipe num_layers=2"),
    "other_optimizer": (
        "--use-distributed-optimizer",
        FINGERPRINT,
        "resume with --no-use-distributed-optimizer",
    ),
}


@pytest.mark.parametrize(("flags", "data", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(saved, recipe, device, flags, data, words):
    with pytest.raises(CheckpointError, match=words) as error:
        checkpoint.load(engine_of(config_of(recipe, flags), device), saved.folder, data)
    assert "\n" not in str(error.value)


def moved(recipe, folder):
    return shutil.copy(recipe.parent / "tokenizer.model", folder / "moved.model")


def of_other_words(recipe, folder):
    write_tokenizer(folder / "other.model", [" ".join(reversed(WORDS))] * 10)
    return folder / "other.model"


def resume(saved, config, device):
    checkpoint.load(engine_of(config, device), saved.folder, FINGERPRINT)


def evaluate(saved, config, device):
    check_trained_with(saved.folder, config, build_tokenizer(config))


def export(saved, config, device):
    (saved.folder / "config.yaml").write_text(to_yaml(config))
    export_run(saved.folder, Path(config.data.tokenizer_model).parent / "exported")


@pytest.mark.parametrize("use", [resume, evaluate, export])
@pytest.mark.parametrize("tokenizer", [moved, of_other_words])
def test_a_tokenizer_is_known_by_its_content(saved, recipe, device, tokenizer, use, tmp_path):
    config = config_of(recipe, f"--tokenizer-model {tokenizer(recipe, tmp_path)} --vocab-size 96")
    if tokenizer is moved:
        use(saved, config, device)
        return
    with pytest.raises(CheckpointError) as error:
        use(saved, config, device)
    for path in (recipe.parent / "tokenizer.model", config.data.tokenizer_model):
        digest = load_tokenizer(path).fingerprint()
        assert re.search(rf"{re.escape(str(path))} (of|has) content {digest}", str(error.value))
    assert "\n" not in str(error.value)


def test_a_save_that_is_cut_short_leaves_the_one_before(saved, recipe, device, tmp_path, monkeypatch):
    engine = engine_of(config_of(recipe), device)
    take_steps(engine, 0, 1)
    checkpoint.save(engine, tmp_path, Progress(iteration=1, consumed_rows=4), FINGERPRINT)

    def killed(state, folder, *_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dist_checkpointing, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(engine, tmp_path, Progress(iteration=2, consumed_rows=8), FINGERPRINT)
    assert checkpoint.load(engine, tmp_path, FINGERPRINT) == Progress(iteration=1, consumed_rows=4)
    checkpoint.save(engine, tmp_path, Progress(iteration=2, consumed_rows=8), FINGERPRINT)
    assert checkpoint.load(engine, tmp_path, FINGERPRINT) == Progress(iteration=2, consumed_rows=8)
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


def test_progress_counts_iterations_and_rows(recipe):
    """A skipped step is an iteration too, and its rows are consumed."""
    engine = SimpleNamespace(config=config_of(recipe, "--global-batch-size 6"), teacher=None)
    state = RunState(progress=Progress(iteration=7, consumed_rows=50))
    for applied, skipped in ((True, 0), (False, 1)):
        result = SimpleNamespace(
            applied=torch.tensor(applied),
            grad_norm=torch.tensor(1.0),
            learning_rate=torch.tensor(1.0),
            teacher_move=None,
        )
        after = _after(state, result, engine)
        assert after.progress == Progress(iteration=8, consumed_rows=56)
        assert int(after.skipped) == skipped


def test_data_go_on_behind_the_rows_that_were_consumed(recipe):
    """In steps of this run's batch, whatever the batch was before; not within one."""
    progress = Progress(iteration=3, consumed_rows=12)
    for batch, step in ((4, 3), (2, 6), (12, 1)):
        assert (
            _data_start(SimpleNamespace(config=config_of(recipe, f"--global-batch-size {batch}")), progress)
            == step
        )
    with pytest.raises(CheckpointError, match="no multiple of global_batch_size=8"):
        _data_start(SimpleNamespace(config=config_of(recipe, "--global-batch-size 8")), progress)
    assert skip_ahead(progress, config_of(recipe)) == progress
    assert skip_ahead(progress, config_of(recipe, "--skip-to 5")) == replace(progress, consumed_rows=20)
    with pytest.raises(ConfigError, match="skip_to=2 lies behind step 3"):
        skip_ahead(progress, config_of(recipe, "--skip-to 2"))


# Folder's recipe (flags; None: none), its tracker, flags of the run -> words of the refusal, None where it may write.
FOLDERS = {
    "new": (None, None, "", None),
    "ended_before_its_first_save": ("", None, "", None),
    "the_same_with_another_recipe": ("--lr 5", None, "", None),
    "resumed": ("", "3", "--load {folder}", None),
    "resumed_with_more_iterations": ("", "3", "--load {folder} --train-iters 20", None),
    "not_resumed": ("", "3", "", "already holds a run"),
    "another_one_resumed": ("", "3", "--load {folder}/../other", "already holds a run"),
    "resumed_at_another_rate": ("", "3", "--load {folder} --lr 5", "optimizer.lr was 0.001, now 5.0"),
    "checkpoint_without_recipe": (None, "3", "", "already holds a run"),
}


@pytest.mark.parametrize(("old", "tracker", "flags", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_run_is_not_written_over(recipe, tmp_path, old, tracker, flags, words):
    folder = tmp_path / "run"
    folder.mkdir()
    if tracker is not None:
        written(folder, tracker)
    if old is not None:
        (folder / "config.yaml").write_text(to_yaml(config_of(recipe, f"--save {folder} {old}")))
    config = config_of(recipe, f"--save {folder} {flags.format(folder=folder)}")
    if words is None:
        check_save_folder(config)
    else:
        with pytest.raises(ConfigError, match=words):
            check_save_folder(config)


TEXT = {"vision": "none", "vocab_size": 100, "lora_rank": 0}
STARTS = {
    "fresh adapters": ("lora_rank", TEXT, 8, True),
    "another rank": ("lora_rank", TEXT | {"lora_rank": 4}, 8, False),
    "tokens for vision": ("vocab_size", TEXT, 103, True),
    "another tokenizer": ("vocab_size", TEXT, 104, False),
    "fewer tokens": ("vocab_size", TEXT, 99, False),
    "an image model's tokens": ("vocab_size", TEXT | {"vision": "clip"}, 103, False),
    "fresh visual path": ("vision", TEXT, "clip", True),
    "another tower": ("vision", TEXT | {"vision": "siglip"}, "clip", False),
    "another family": ("family", TEXT, "qwen3", False),
}


@pytest.mark.parametrize(("name", "stored", "wanted", "may"), STARTS.values(), ids=STARTS)
def test_what_a_run_may_start_from(name, stored, wanted, may):
    assert may_start(name, stored, wanted, 3) == may
