"""Damaged, foreign and poisoned checkpoints: each is named in one line or passed over; none is silent, none runs."""

import contextlib
import errno
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from laver_mcore.cli import inspect_checkpoint
from laver_mcore.convert.distributed_checkpoint import CheckpointReader
from laver_mcore.megatron import publishing
from laver_mcore.megatron.checkpoints import CheckpointError, SaveError
from laver_mcore.megatron.intact import candidates, first_fault, newest_intact, saved_iterations, seal
from laver_mcore.megatron.publishing import prune
from laver_mcore.megatron.unpickling import nothing_runs
from laver_mcore.train import checkpoint, saved_weights
from laver_mcore.train.checkpoint import Progress

DATA = "these data"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def pristine(engine, tmp_path_factory):
    """A run with checkpoints at 2 and at 4."""
    folder = tmp_path_factory.mktemp("pristine") / "run"
    for iteration in (2, 4):
        checkpoint.save(
            engine,
            folder,
            Progress(iteration=iteration, consumed_rows=4 * iteration, skipped=iteration),
            DATA,
        )
    return folder


@pytest.fixture
def run(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


def flip(at):
    """One bit at a share of the file's length."""

    def damage(file):
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 16
        file.write_bytes(data)

    return damage


def cut(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def from_the_one_before(file):
    shutil.copy(file.parents[1] / "iter_0000002" / file.name, file)


DAMAGES = {
    **{f"bit_{at}": flip(at) for at in (0.0, 0.1, 0.4, 0.7, 1.0)},
    **{f"cut_{share}": cut(share) for share in (0.0, 0.3, 0.99)},
    "deleted": lambda file: file.unlink(),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}
FILES = [".metadata", "common.pt", "metadata.json", "__0_0.distcp", "__0_1.distcp", "checksums.json"]
EVERY = [(name, damage) for name in FILES for damage in DAMAGES]
EVERY = [
    e
    for e in EVERY
    if e[0] != "checksums.json" or e[1] not in ("deleted", "folder", "bit_0.4", "bit_0.1", "bit_0.7")
]


@pytest.mark.parametrize(("name", "damage"), EVERY, ids=lambda value: str(value))
def test_every_damage_is_named_and_the_one_before_is_loaded(run, engine, caplog, name, damage):
    DAMAGES[damage](run / "iter_0000004" / name)
    assert checkpoint.load(engine, run, DATA) == Progress(iteration=2, consumed_rows=8, skipped=2)
    (line,) = [record.getMessage() for record in caplog.records if "going on from" in record.getMessage()]
    assert line.startswith(f"iter_0000004 is damaged ({name}: ") and line.endswith(
        "going on from iter_0000002"
    )
    assert "\n" not in line


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt"])
def test_a_file_of_another_iteration_is_noticed(run, name):
    first, second = (run / f"iter_000000{n}" / name for n in (2, 4))
    second.write_bytes(second.read_bytes())
    if name == "__0_0.distcp":  # of the same length, and whole in itself
        data = bytearray(first.read_bytes())
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    from_the_one_before(second)
    if second.read_bytes() != first.read_bytes():
        pytest.fail("not copied")
    assert (first_fault(run / "iter_0000004") or "").startswith(f"{name}: ")


def test_where_all_are_damaged_nothing_is_loaded(run, engine):
    for folder in run.glob("iter_*"):
        (folder / "common.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint that is whole: iter_0000004 .*; iter_0000002 "
    ) as raised:
        checkpoint.load(engine, run, DATA)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", [None, "", "newest", "7", "٤", "-4", "\x00"], ids=repr)
def test_without_a_tracker_the_newest_is_found(run, engine, text, caplog):
    (run / TRACKER).unlink()
    if text is not None:
        (run / TRACKER).write_text(text)
    assert checkpoint.load(engine, run, DATA).iteration == 4
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
    assert TRACKER in caplog.text or "iter_0000007 is missing" in caplog.text


def test_the_tracker_is_the_users_to_turn_back(run, engine):
    (run / TRACKER).write_text("2")
    assert checkpoint.load(engine, run, DATA).iteration == 2
    assert candidates(run) == [2, 4]


def test_a_save_on_its_way_is_no_checkpoint(run):
    (run / TRACKER).unlink()
    shutil.copytree(run / "iter_0000004", run / "iter_0000006.saving")
    assert saved_iterations(run) == [4, 2]
    assert newest_intact(run)[0].name == "iter_0000004"


def test_one_without_checksums_is_older_and_loads_where_the_tracker_names_it(run, engine):
    (run / "iter_0000004" / "checksums.json").unlink()
    assert checkpoint.load(engine, run, DATA).iteration == 4
    (run / TRACKER).unlink()  # then nothing says that it was finished
    assert checkpoint.load(engine, run, DATA).iteration == 2


def test_checksums_may_be_passed_over_but_not_sizes(run):
    flip(0.5)(run / "iter_0000004" / "__0_0.distcp")
    assert first_fault(run / "iter_0000004", verify=False) is None
    assert "checksum" in first_fault(run / "iter_0000004")
    cut(0.5)(run / "iter_0000004" / "__0_0.distcp")
    assert "bytes, was saved with" in first_fault(run / "iter_0000004", verify=False)


def test_what_is_looked_up_before_a_start_is_verified_as_what_is_loaded(run):
    for folder in run.glob("iter_*"):
        flip(0.5)(folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt: is not what was saved"):
        saved_weights.lacks_frozen(run, verify=True)


class Payload:
    """What a stranger may write: it makes a file when it is read."""

    def __init__(self, witness):
        self._witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self._witness),))


def poison_contents(folder, payload):
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def poison_part_of_the_contents(folder, payload):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(replace(metadata, planner_data=payload)))


def poison_common(folder, payload):
    common = torch.load(folder / "common.pt", weights_only=True)
    torch.save({**common, "payload": payload}, folder / "common.pt")


def poison_an_old_common(folder, payload):
    torch.save(payload, folder / "common.pt", _use_new_zipfile_serialization=False)


def poison_an_object(folder, payload):
    """In place of the random numbers' state, which is pickled among the tensors."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith("rng_state"))
    file = folder / "poison.distcp"
    torch.save(payload, file)
    info = metadata.storage_data[index]
    metadata.storage_data[index] = replace(
        info, relative_path=file.name, offset=0, length=file.stat().st_size
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_a_tensor(folder, payload):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "mask_token")
    file = folder / "poison.distcp"
    torch.save(payload, file)
    info = metadata.storage_data[index]
    metadata.storage_data[index] = replace(
        info, relative_path=file.name, offset=0, length=file.stat().st_size
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


POISONS = [
    poison_contents,
    poison_part_of_the_contents,
    poison_common,
    poison_an_old_common,
    poison_an_object,
    poison_a_tensor,
]


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
def test_no_payload_runs(run, engine, tmp_path, poison):
    """Without checksums, as a stranger would hand it over: on a resume, a start from weights, and in the tools."""
    witness = tmp_path / "ran"
    folder = run / "iter_0000004"
    (folder / "checksums.json").unlink()
    poison(folder, Payload(witness))
    for attempt in (
        lambda: checkpoint.load(engine, run, DATA),
        lambda: saved_weights.load_weights(engine.chunks, engine.config, engine.vocab_size, run),
        lambda: CheckpointReader(folder).read("mask_token"),
    ):
        with contextlib.suppress(CheckpointError):  # what is not read cannot be refused
            attempt()
        assert not witness.exists()
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(engine, run, DATA)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert not witness.exists()


def test_the_payload_is_one(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


def test_afterwards_everything_loads_as_before():
    load = torch.load
    with pytest.raises(CheckpointError), nothing_runs():
        raise CheckpointError("x")
    assert torch.load is load


def test_a_full_disk_is_one_line_and_nothing_is_lost(run, engine, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SaveError, match=r"No space left on device: 0\.00 GiB free, 0\.0\d needed"):
        checkpoint.save(engine, run, Progress(iteration=6), DATA)
    usage.free = 10**12
    assert saved_iterations(run) == [4, 2] and not list(run.glob("*.saving"))
    checkpoint.save(engine, run, Progress(iteration=6), DATA)
    assert newest_intact(run) == (run / "iter_0000006", [])


def test_an_error_in_the_middle_of_a_save_leaves_nothing_half(run, engine, monkeypatch):
    def full(*_, **__):
        (run / "iter_0000006.saving" / "__0_0.distcp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dist_checkpointing, "save", full)
        with pytest.raises(SaveError, match=r"iter_0000006: not saved \(No space left on device\)"):
            checkpoint.save(engine, run, Progress(iteration=6), DATA)
    assert not list(run.glob("*.saving")) and newest_intact(run)[0].name == "iter_0000004"


def test_weights_that_are_not_finite_are_not_saved(run, engine):
    weight = engine.chunks[0].decoder.final_layernorm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = torch.nan
        with pytest.raises(
            SaveError, match=r"decoder.final_layernorm.weight and 0 other weights are not finite"
        ):
            checkpoint.save(engine, run, Progress(iteration=4), DATA)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert newest_intact(run)[0].name == "iter_0000004"


@pytest.mark.parametrize(
    ("keep", "left"),
    [((None, None), [5, 4, 3, 2, 1]), ((2, None), [5, 4]), ((1, 2), [5, 4, 2]), ((9, None), [5, 4, 3, 2, 1])],
)
def test_old_checkpoints_are_deleted(tmp_path, engine, keep, left):
    for iteration in range(1, 6):
        stand_in(tmp_path, iteration)
    prune(tmp_path, 5, keep_last=keep[0], keep_every=keep[1])
    assert saved_iterations(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def stand_in(directory, iteration):
    folder = directory / f"iter_{iteration:07d}"
    folder.mkdir()
    for name in (".metadata", "common.pt", "metadata.json"):
        (folder / name).write_text(f"{name} of {iteration}")
    seal(folder)
    return folder


def test_after_a_fall_back_the_only_whole_checkpoint_is_kept(tmp_path, engine):
    """8 and 6 are damaged, the run goes on from 4 and saves 6 again: nothing but 4 may be deleted."""
    for iteration in (4, 6, 8):
        stand_in(tmp_path, iteration)
    (tmp_path / "iter_0000006" / "common.pt").write_text("")
    (tmp_path / "iter_0000008" / "common.pt").write_text("")
    prune(tmp_path, 4, keep_last=1, keep_every=None)
    assert saved_iterations(tmp_path) == [8, 6, 4]
    shutil.rmtree(tmp_path / "iter_0000006")
    stand_in(tmp_path, 6)
    (tmp_path / TRACKER).write_text("6")
    prune(tmp_path, 6, keep_last=1, keep_every=None)
    assert saved_iterations(tmp_path) == [8, 6]
    assert newest_intact(tmp_path)[0].name == "iter_0000006"


def test_common_state_is_no_archive_of_code(pristine):
    """What this project writes itself needs nothing beyond tensors and plain values."""
    with zipfile.ZipFile(pristine / "iter_0000004" / "common.pt") as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        assert b"__main__" not in archive.read(name)


def test_the_tool_says_what_is_there_and_what_is_damaged(run, capsys):
    assert inspect_checkpoint.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "2 checkpoints, 4 tracked" in said and "iter_0000004: whole" in said and "'iteration': 2" in said
    assert inspect_checkpoint.main([str(run / "iter_0000002"), "--tensors"]) == 0
    assert "mask_token [64] torch.float32" in capsys.readouterr().out
    flip(0.5)(run / "iter_0000004" / "__0_0.distcp")
    assert inspect_checkpoint.main([str(run)]) == 1
    said = capsys.readouterr().out
    assert (
        "iter_0000004: DAMAGED (__0_0.distcp: is not what was saved" in said and "iter_0000002: whole" in said
    )
    assert inspect_checkpoint.main([str(run.parent / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith("nowhere holds no checkpoint\n")
