"""Worker processes: the same batches, survival of a kill, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from sample_run import write_sample_data

from laver_mcore.data.errors import DataError
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.sequence.tokenizer import load_tokenizer
from laver_mcore.data.serve import workers
from laver_mcore.data.serve.assemble import ReadTask
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.data.serve.workers import WorkerPool

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


@pytest.fixture(autouse=True)
def others():
    """Child processes that other tests of this pytest worker have left, such as torch.compile's, which stay."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    OTHERS.update(before)
    yield
    OTHERS.difference_update(before)


OTHERS: set[int] = set()


def children():
    """Processes that `multiprocessing` has started for this test, dead ones that nobody has waited for included."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = "" if process.pid in OTHERS else " ".join(process.cmdline())
        except psutil.ZombieProcess:
            command = "spawn_main"
        except psutil.NoSuchProcess:
            continue
        if "spawn_main" in command:
            found.append(process)
    return found


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
        task = ReadTask(members=(0, 1))
        assert len(pool.submit(task).result(300).samples) == 2
        original = workers._Worker.ask

        def ask(self, task, timeout):
            self.process.kill()
            return original(self, task, timeout)

        monkeypatch.setattr(workers._Worker, "ask", ask)
        with pytest.raises(DataError, match=r"data worker 0 ended with exit code -9, 2 times in a row"):
            pool.submit(task).result(60)
    assert not children()


def test_errors_in_a_worker_arrive_as_they_are(dataset, tokenizer):
    data = build(dataset, tokenizer)
    with WorkerPool(data._task, 1) as pool, pytest.raises(RuntimeError, match="IndexError"):
        pool.submit(ReadTask(members=(10**6,))).result(300)


class _Stuck(PatchImageProcessor):
    """Hangs over a black picture."""

    def __call__(self, images):
        for image in images:
            if max(high for _, high in image.getextrema()) == 0:
                time.sleep(3600)
        return super().__call__(images)


class _Deadly(PatchImageProcessor):
    """Kills the process that sees a black picture, as a decoder with a memory fault does."""

    def __call__(self, images):
        if any(max(high for _, high in image.getextrema()) == 0 for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images)


@pytest.mark.parametrize(("kind", "why"), [(_Stuck, "said nothing for 2 s"), (_Deadly, "exit code -9")])
def test_a_sample_that_hangs_or_kills_its_worker_is_quarantined(kind, why, dataset, tokenizer, tmp_path):
    for file in dataset.glob("*.json"):
        shutil.copy(file, tmp_path)
    for file in dataset.glob("*.png"):
        shutil.copy(file, tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "000_0.png")
    processor = kind(image_size=16, patch_size=8)
    data = build(
        tmp_path,
        tokenizer,
        num_workers=1,
        worker_timeout=2.0,
        image_processor=processor,
        quarantine=tmp_path / "quarantine.jsonl",
    )
    steps = -(-data.rows_per_epoch(0) // 4)
    found = [key for batches in data.iterate(0, steps, **SIZES) for b in batches for key, _ in b.image_keys]
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "sample-000"
    assert why in json.loads(line)["reason"]
    assert "over it, 2 times" in json.loads(line)["reason"]  # the first time may not be the sample's fault
    assert "sample-000" not in found and "sample-001" in found
    assert not children()


def test_a_stopped_worker_is_replaced_within_its_time(dataset, tokenizer, tmp_path):
    data = build(
        dataset, tokenizer, num_workers=2, worker_timeout=2.0, quarantine=tmp_path / "quarantine.jsonl"
    )
    expected = [data.step_batches(step, **SIZES) for step in range(10)]
    steps = data.iterate(0, 10, **SIZES)
    got = [next(steps)]
    stopped = [process.pid for process in children()]
    for process in children():
        process.send_signal(signal.SIGSTOP)
    got += list(steps)
    for first, second in zip(expected, got, strict=True):
        assert all(torch.equal(a.tokens_T, b.tokens_T) for a, b in zip(first, second, strict=True))
    assert not (tmp_path / "quarantine.jsonl").exists()  # the samples were not to blame
    assert not children()
    assert not any(psutil.pid_exists(pid) for pid in stopped)


def test_closing_does_not_wait_for_a_stopped_worker(dataset, tokenizer):
    steps = build(dataset, tokenizer, num_workers=1).iterate(0, 10**6, **SIZES)
    next(steps)
    for process in children():
        process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    steps.close()
    assert time.monotonic() - started < 20
    assert not children()


SCRIPT = """
import sys, time
from pathlib import Path
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.data.sequence.tokenizer import load_tokenizer

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
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "running\n"
    if end != "crash":
        assert len(marked(str(tmp_path))) >= 3  # the run and two workers
        process.send_signal(signal.SIGINT if end == "ctrl-c" else signal.SIGKILL)
    process.wait(30)
    _, alive = psutil.wait_procs(marked(str(tmp_path)), timeout=15)
    assert not alive
    assert process.returncode != 0
