"""Worker processes: the same batches, survival of a kill, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from sample_run import write_sample_data

from laver_mcore.data import workers
from laver_mcore.data.assemble import Plan
from laver_mcore.data.errors import DataError
from laver_mcore.data.images import PatchImageProcessor
from laver_mcore.data.loader import DialogueData
from laver_mcore.data.tokenizer import load_tokenizer
from laver_mcore.data.workers import WorkerPool

ROOT = Path(__file__).parents[2]
PROCESSOR = PatchImageProcessor(image_size=16, patch_size=8)
SIZES = {"global_batch_size": 4, "micro_batch_size": 2, "image_share": (0, 1)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_sample_data(tmp_path_factory.mktemp("workers")).parent


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return load_tokenizer(dataset / "tokenizer.model")


def build(dataset, tokenizer, **changes):
    settings = {"image_processor": PROCESSOR, "seq_length": 256, "seed": 7, "tokenizer": tokenizer}
    return DialogueData(dataset / "train.json", **settings | changes)


def children():
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if "laver" in p.name() or "spawn" in " ".join(p.cmdline())
    ]


@pytest.mark.parametrize("backend", ["pillow", "torch_uint8"])
def test_workers_give_the_same_batches_and_end(backend, dataset, tokenizer):
    expected = list(build(dataset, tokenizer, image_backend=backend).iterate(2, 6, **SIZES))
    got = list(build(dataset, tokenizer, image_backend=backend, num_workers=2).iterate(2, 6, **SIZES))
    for first, second in zip(expected, got, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.tokens_T, b.tokens_T)
            assert torch.equal(a.pixels, b.pixels)
            assert a.image_keys == b.image_keys
    assert not children()


def test_a_killed_worker_is_replaced_and_the_run_goes_on(dataset, tokenizer):
    data = build(dataset, tokenizer, num_workers=1)
    expected = [data.step_batches(step, **SIZES) for step in range(8)]
    steps = data.iterate(0, 8, **SIZES)
    got = [next(steps)]
    started = time.monotonic()
    for process in children():
        process.send_signal(signal.SIGKILL)
    got += list(steps)
    assert time.monotonic() - started < 30
    for first, second in zip(expected, got, strict=True):
        assert all(torch.equal(a.tokens_T, b.tokens_T) for a, b in zip(first, second, strict=True))
    assert not children()


def test_a_worker_that_keeps_dying_is_reported(dataset, tokenizer, monkeypatch):
    monkeypatch.setattr(workers, "MAX_DEATHS", 2)
    data = build(dataset, tokenizer)
    with WorkerPool(data._task, 1) as pool:
        plan = Plan(members=(0, 1), image_share=None)
        assert len(pool.submit(plan).result(30).keys) == 2
        original = workers._Worker.ask

        def ask(self, plan):
            self.process.kill()
            return original(self, plan)

        monkeypatch.setattr(workers._Worker, "ask", ask)
        with pytest.raises(DataError, match=r"data worker 0 ended with exit code -9, 2 times in a row"):
            pool.submit(plan).result(60)
    assert not children()


def test_errors_in_a_worker_arrive_as_they_are(dataset, tokenizer):
    data = build(dataset, tokenizer)
    with WorkerPool(data._task, 1) as pool, pytest.raises(RuntimeError, match="IndexError"):
        pool.submit(Plan(members=(10**6,), image_share=None)).result(30)


SCRIPT = """
import sys, time
from pathlib import Path
from laver_mcore.data.images import PatchImageProcessor
from laver_mcore.data.loader import DialogueData
from laver_mcore.data.tokenizer import load_tokenizer

if __name__ == "__main__":
    data = DialogueData(
        Path(sys.argv[1]) / "train.json", image_processor=PatchImageProcessor(image_size=16, patch_size=8),
        seq_length=256, seed=7, tokenizer=load_tokenizer(sys.argv[2]), num_workers=2,
    )
    for number, batches in enumerate(
        data.iterate(0, 10**6, global_batch_size=4, micro_batch_size=2, image_share=(0, 1))
    ):
        if number == 2:
            print("running", flush=True)
            if sys.argv[3] == "crash":
                raise RuntimeError("a crash")
        if number >= 2:
            time.sleep(0.05)
"""


def marked(name):
    """Processes that were started with MARK=name in their environment, the workers of a run among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("end", ["crash", "ctrl-c", "kill"])
def test_nothing_is_left_behind(end, dataset, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(dataset), str(dataset / "tokenizer.model"), end],
        env=os.environ | {"PYTHONPATH": path, "MARK": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "running\n"
    if end != "crash":
        assert len(marked(str(tmp_path))) >= 3  # the run and two workers
        process.send_signal(signal.SIGINT if end == "ctrl-c" else signal.SIGKILL)
    process.wait(30)
    _, alive = psutil.wait_procs(marked(str(tmp_path)), timeout=15)
    assert not alive
    assert process.returncode != 0
