"""Saves beside training: what stood there when they began, published once all is written, a line where one fails."""

import dataclasses
import json
import os
import resource
import signal
import threading
import time

import pytest
import torch

from laver_mcore.megatron.checkpoints import SaveError
from laver_mcore.megatron.intact import first_fault, newest_intact, saved_iterations
from laver_mcore.train import checkpoint
from laver_mcore.train.checkpoint import Progress, begin_save
from laver_mcore.train.saving import Saver
from laver_mcore.train.skips import DivergedError

DATA = "these data"


@pytest.fixture
def run(engine, tmp_path):
    """The engine as a run that saves beside training, in a folder of its own."""
    settings = dataclasses.replace(engine.config.run, save=str(tmp_path / "run"), async_save=True)
    config = dataclasses.replace(engine.config, run=settings)
    return dataclasses.replace(engine, config=config), tmp_path / "run"


def tensors(engine):
    """Everything that training changes, without a copy."""
    moments = engine.optimizer.optimizer.state.values()
    found = [engine.objective.center_K, *engine.teacher.averages.values(), *engine.chunks[0].parameters()]
    return [t.detach() for t in found] + [s[name] for s in moments for name in ("exp_avg", "exp_avg_sq")]


def test_it_holds_what_stood_there_when_it_began(run):
    engine, folder = run
    wanted = [t.clone() for t in tensors(engine)]
    write = begin_save(engine, folder, Progress(iteration=2), DATA)
    for tensor in tensors(engine):
        tensor.add_(1.0)
    assert not saved_iterations(folder) and not (folder / "latest_checkpointed_iteration.txt").exists()
    assert write.finish() == folder / "iter_0000002"
    assert newest_intact(folder) == (folder / "iter_0000002", [])
    checkpoint.load(engine, folder, DATA)
    assert len(wanted) > 100
    for found, before in zip(tensors(engine), wanted, strict=True):
        assert torch.equal(found, before)


def test_every_file_has_the_checksum_of_what_was_written(run):
    engine, folder = run
    checkpoint.save(engine, folder, Progress(iteration=2), DATA)
    sealed = json.loads((folder / "iter_0000002" / "checksums.json").read_text())["files"]
    files = {file.name for file in (folder / "iter_0000002").iterdir()}
    assert set(sealed) == files - {"checksums.json"} and sum(name.endswith(".distcp") for name in files) == 2
    assert first_fault(folder / "iter_0000002") is None


def kill(saver):
    """Its writer, as the kernel does that runs out of memory."""
    os.kill(saver._pending._copied._pid, signal.SIGKILL)


def test_a_save_that_fails_is_a_line_and_the_next_is_tried(run, capsys):
    engine, folder = run
    with Saver(engine, DATA) as saver:
        saver.save(Progress(iteration=2), 0, last=False)
        kill(saver)
        saver.save(Progress(iteration=4), 0, last=False)
        failed, _ = capsys.readouterr()
    said, _ = capsys.readouterr()
    assert failed == f"{folder}/iter_0000002: not saved (the process that wrote it has died); going on, the next " \
        "save is tried\n"  # fmt: skip
    assert said.startswith(f"saved {folder}/iter_0000004 in ") and ", training waited " in said
    assert saved_iterations(folder) == [4] and not list(folder.glob("*.saving"))


def test_the_last_save_of_a_run_may_not_fail(run, monkeypatch):
    engine, folder = run
    begin = checkpoint.begin_save

    def dies(*arguments):
        write = begin(*arguments)
        os.kill(write._copied._pid, signal.SIGKILL)
        return write

    monkeypatch.setattr(checkpoint, "begin_save", dies)
    with pytest.raises(SaveError, match="has died"), Saver(engine, DATA) as saver:
        saver.save(Progress(iteration=2), 0, last=True)
    assert not saved_iterations(folder)


def test_looking_publishes_what_is_written_and_waits_for_nothing(run):
    engine, folder = run
    with Saver(engine, DATA) as saver:
        saver.save(Progress(iteration=2), 0, last=False)
        pid = saver._pending._copied._pid
        os.kill(pid, signal.SIGSTOP)
        wakes = threading.Timer(5.0, os.kill, (pid, signal.SIGCONT))  # one that is waited for comes to an end
        wakes.start()
        for _ in range(3):
            saver.look()
        assert not saved_iterations(folder)
        wakes.cancel()
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 30
        while not saved_iterations(folder) and time.monotonic() < deadline:
            saver.look()
            time.sleep(0.01)
        assert saved_iterations(folder) == [2]


@pytest.mark.parametrize(("error", "left"), [(DivergedError, [2]), (KeyError, [])])
def test_what_is_on_its_way_when_a_run_fails(run, error, left):
    """All ranks diverge alike and can wait for each other; where one alone fails there is nobody to ask."""
    engine, folder = run
    saver = Saver(engine, DATA)
    saver.save(Progress(iteration=2), 0, last=False)
    pending = saver._pending
    saver.__exit__(error)
    assert saved_iterations(folder) == left
    if not left:
        pending.finish()


def test_a_file_that_cannot_be_written_is_one_line(run, capfd):
    """The disk refuses in the writer's own process, which says nothing by itself."""
    engine, folder = run
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        write = begin_save(engine, folder, Progress(iteration=2), DATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(
        SaveError, match=r"iter_0000002: not saved \(a file could not be written whole, as on"
    ):
        write.finish()
    assert capfd.readouterr() == ("", "")
    assert not saved_iterations(folder) and not list(folder.glob("*.saving"))
