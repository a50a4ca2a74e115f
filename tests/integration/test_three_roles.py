"""Three people at the terminal, each a script of commands from clone to answer: all work, and nothing is noise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sample_decoders import random_decoder
from sample_run import write_sample_data
from sample_tokenizers import write_tokenizer_of

from integration.harness import REPOSITORY
from integration.test_export import write_tower

ROLES = sorted(path.stem for path in (REPOSITORY / "tests" / "three_roles").glob("*.sh"))
NOISE = re.compile(
    r"Traceback|[Ww]arning|[Dd]eprecat|\[W\d|\[transformers\]|^[WEI]\d{4} |it/s\]|rank\d+\]:|Exception"
    r"|not installed|falling back|\bNone\b|differs",
    re.M,
)

RECIPE = """\
model: {model: qwen2.5-7b}
vision: {vision: clip, vision_path: models/clip, vision_layer: -2, vision_random_init: true}
attention: {mixed_attention: false, rope_2d: false}
objective: lm
data: {data_path: [shards], tokenizer_model: models/qwen, seq_length: 256}
optimizer: {lr: 1.0e-3}
train: {train_iters: 4, global_batch_size: 4, trainable: ["connector.*", "language_model.*"]}
run: {hf_path: models/qwen, log_interval: 1}
"""


def downloads(folder: Path) -> None:
    """What an engineer has: a text model, a tower, LLaVA JSON with its images, a recipe; tiny and random."""
    write_tokenizer_of(folder / "models" / "qwen", "qwen2.5")
    random_decoder("qwen2", vocab_size=400).save_pretrained(folder / "models" / "qwen")
    write_tower(folder / "models" / "clip", "clip")
    write_sample_data(folder / "llava", num_samples=12)
    (folder / "mine.yaml").write_text(RECIPE)


@pytest.mark.parametrize("role", ROLES)
def test_no_wrong_turn(role, tmp_path):
    downloads(tmp_path)
    environment = os.environ | {
        "ROOT": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    script = REPOSITORY / "tests" / "three_roles" / f"{role}.sh"
    done = subprocess.run(
        ["bash", "-eu", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    assert NOISE.findall(done.stdout) == []
    assert done.stdout.strip()
