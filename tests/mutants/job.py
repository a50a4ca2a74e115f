"""One job of `make mutants`: runs tests in its own copy of the repository, with a fault or without.

Starting Python and importing torch, transformers and Megatron-Core takes ten times as long as most tests. So a job
imports them once, nothing of this project, and forks for every run: the child imports the project's packages from
the copy as it then stands. Requests and answers are lines of JSON on standard input and output.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "numpy torch torch.distributed.checkpoint torch.distributed.run torch.nn.attention PIL.Image safetensors.torch"
    " scipy.optimize sentencepiece tokenizers tyro pydantic tqdm yaml megatron.core megatron.core.optimizer"
    " megatron.core.distributed megatron.core.dist_checkpointing megatron.core.pipeline_parallel"
    " megatron.core.models.gpt.gpt_layer_specs transformers.models.qwen2.modeling_qwen2"
    " transformers.models.siglip.modeling_siglip transformers.models.clip.modeling_clip"
    " transformers.models.dinov2.modeling_dinov2 transformers.models.qwen2_vl.modeling_qwen2_vl"
)

# One thread, no GPU (kernels run in Triton's interpreter, which must be said before Triton is imported).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    # Bytecode knows its source by second and size alone: a changed digit can be missed. Nobody writes any; that of the
    # copy was made beforehand and knows its source by hash.
    "PYTHONDONTWRITEBYTECODE": "1",
}
STRAY = 70
"""Exit status of a child that imported a package from somewhere else than its copy."""
PATIENCE = 5.0
"""Seconds that tests which took too long have to clear up."""


def preload(modules: Sequence[str]) -> None:
    """Import what is not ours and is installed."""
    # As laver_mcore does before it imports Megatron: on a CPU, functions that it would compile stay as written.
    jit = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = lambda function: function  # type: ignore[attr-defined]
    sys.modules["megatron.core.jit"] = jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            if importlib.util.find_spec(module.split(".")[0]) is not None:
                importlib.import_module(module)
    ours = [name for name in sys.modules if name.startswith(("laver_", "pretrain_laver"))]
    assert not ours, f"imported beforehand, so no fault in them would show: {ours}"
    assert threading.active_count() == 1, "a process with threads cannot fork safely"


@contextlib.contextmanager
def planted(copy: Path, fault: dict[str, Any] | None) -> Iterator[None]:
    """The copy with a fault in it."""
    if fault is None:
        yield
        return
    path = copy / fault["file"]
    original = path.read_bytes()
    old, new = fault["old"].encode(), fault["new"].encode()
    assert original.count(old) == 1
    try:
        path.write_bytes(original.replace(old, new))
        yield
    finally:
        path.write_bytes(original)


class _Passed:
    """Pytest plugin that counts the tests that passed."""

    count = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.count += report.when == "call" and report.passed


def _packages(copy: Path) -> dict[str, Path]:
    """Name and folder of every package of the copy that tests import."""
    return {
        init.parent.name: init.parent
        for top in (copy, copy / "kernels")
        for init in top.glob("*/__init__.py")
    }


def _imported_elsewhere(packages: dict[str, Path]) -> list[str]:
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return [
        f"{name} is {file}"
        for name, file in files.items()
        if (package := name.partition(".")[0]) in packages
        and file is not None
        and not Path(file).is_relative_to(packages[package])
    ]


def _run_tests(copy: Path, arguments: Sequence[str], count_pipe: int) -> int:
    """In the child: pytest on the copy's packages; its exit status."""
    import pytest

    os.chdir(copy)
    ours = [str(copy), str(copy / "kernels")]
    repository = Path(__file__).resolve().parents[2]
    foreign = {str(repository), str(repository / "kernels"), str(Path(__file__).resolve().parent)}
    sys.path[:] = ours + [entry for entry in sys.path if entry not in foreign]
    os.environ["PYTHONPATH"] = os.pathsep.join(ours)
    packages = _packages(copy)
    for name, folder in packages.items():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).parent != folder:
            print(f"{name} would be imported from {spec and spec.origin}, not from {folder}")
            return STRAY
    passed = _Passed()
    temporary = copy.with_name(copy.name + "_tmp")
    flags = ["-p", "no:cacheprovider", "-x", "-q", f"--rootdir={copy}", f"--basetemp={temporary}"]
    code = int(pytest.main([*flags, *arguments], plugins=[passed]))
    os.write(count_pipe, str(passed.count).encode())
    if strays := _imported_elsewhere(packages):
        print("imported from elsewhere than the copy: " + "; ".join(strays))
        return STRAY
    return code


def _child(copy: Path, arguments: Sequence[str], log: Path, count_pipe: int) -> None:
    """Never returns."""
    code = STRAY
    try:
        os.setsid()
        with log.open("wb") as file, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = _run_tests(copy, arguments, count_pipe)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    """Exit status of a child that ends within so many seconds, None of one that does not."""
    end, parent = time.monotonic() + seconds, os.getppid()
    while time.monotonic() < end and os.getppid() == parent:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the usual case: nothing is left
        os.killpg(group, number)


def run_forked(copy: Path, arguments: Sequence[str], log: Path, timeout: float) -> dict[str, Any]:
    """{code, passed, seconds} of pytest in a child; code is None where it took longer than `timeout` seconds."""
    start = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(copy, arguments, log, writing)
    os.close(writing)
    code, ended = None, False
    try:
        code = _wait(child, timeout)
        ended = code is not None
    finally:
        if not ended:
            _signal(
                child, signal.SIGTERM
            )  # torchrun passes it on to its ranks, which are in groups of their own
            ended = _wait(child, PATIENCE) is not None
        _signal(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        os.set_blocking(reading, False)  # a grandchild may still hold the other end
        passed = int(pipe.read() or 0)
    return {"code": code, "passed": passed, "seconds": time.monotonic() - start}


def main(argv: Sequence[str]) -> None:
    copy, modules = Path(argv[0]), argv[1].split()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    os.environ.update(ENVIRONMENT)
    sys.dont_write_bytecode = True
    preload(modules)
    for line in sys.stdin:
        request = json.loads(line)
        with planted(copy, request["fault"]):
            answer = run_forked(copy, request["arguments"], Path(request["log"]), request["timeout"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
