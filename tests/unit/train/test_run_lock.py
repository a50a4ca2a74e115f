"""One run in a folder: the living are respected, the dead are not."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.train import run_lock
from laver_mcore.train.run_lock import NAME, STALE_AFTER, RunLock


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(
            ConfigError, match=rf"is being written by process {os.getpid()} on {socket.gethostname()} "
        ):
            RunLock(tmp_path / "run").__enter__()
        assert (tmp_path / "run" / NAME).is_file()
    with RunLock(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_killed_owner_leaves_nothing_shut(tmp_path):
    code = (
        "import os, signal, sys; from laver_mcore.train.run_lock import RunLock; "
        "RunLock(sys.argv[1]).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9 and (tmp_path / NAME).is_file()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def owner(tmp_path, age=0.0, **changed):
    lock = RunLock(tmp_path)
    lock._create()
    found = json.loads((tmp_path / NAME).read_text()) | changed
    (tmp_path / NAME).write_text(json.dumps(found))
    os.utime(tmp_path / NAME, (time.time() - age,) * 2)


DEAD = {
    "another_process_with_its_number": dict(started="another boot:1"),
    "no_such_process": dict(pid=2**22 + 5),
    "elsewhere_and_silent": dict(host="node-7", age=STALE_AFTER + 5),
    "senseless": dict(pid="x", started=None),
}


@pytest.mark.parametrize("change", DEAD.values(), ids=DEAD)
def test_a_dead_owner_gives_way(tmp_path, change):
    owner(tmp_path, **change)
    with RunLock(tmp_path):
        pass


def test_another_machines_owner_lives_while_it_touches_its_lock(tmp_path):
    owner(tmp_path, host="node-7", age=STALE_AFTER - 30)
    with pytest.raises(ConfigError, match="on node-7"):
        RunLock(tmp_path).__enter__()


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x00"], ids=repr)
def test_a_lock_that_was_cut_short_is_nobodys(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with RunLock(tmp_path):
        pass


def test_it_is_touched_while_the_run_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCHED_EVERY", 0.02)
    with RunLock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_of_many_one_gets_it(tmp_path):
    """Over a dead owner's lock, which all of them try to break."""
    for _ in range(20):
        owner(tmp_path, pid=2**22 + 5)
        got, refused = [], []

        def attempt(got=got, refused=refused):
            lock = RunLock(tmp_path)
            try:
                got.append(lock.__enter__())
            except ConfigError:
                refused.append(lock)

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 5
        got[0].__exit__()
