"""A run of two ranks that is told to stop saves where it stands, and continues from there."""

import signal
import subprocess
import sys
import time

from long import LONG

from integration.harness import REPOSITORY, environment, read_metrics, torchrun


@LONG
def test_sigterm_saves_and_the_run_continues(data_directory, tmp_path):
    run = tmp_path / "run"
    flags = f"--config {data_directory / 'recipe.yaml'} --save {run} --load {run} --train-iters 100000"
    argv = ["pretrain_laver.py", *flags.split(), "--no-tensorboard"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file)
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    said = log.read_text()
    stopped = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert 2 < stopped < 100_000
    assert f"told to stop after iteration {stopped}: saved in {run}" in said, said[-4000:]
    assert [row["iteration"] for row in read_metrics(run)] == list(range(1, stopped + 1))
    done = torchrun(2, *argv, "--exit-interval", str(stopped + 1))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resumed from {run} at iteration {stopped}" in done.stdout
    assert read_metrics(run)[-1]["iteration"] == stopped + 1
