"""What the host does before a launch: how often it compiles, and that the short way is taken and right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laver_kernels import mixed_attention
from laver_kernels.launch import regular
from laver_kernels.testing_masks import intervals_of, text

pytest.importorskip("triton")
HOST_TIME = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "host_time.py"


def _run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HOST_TIME), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fifty_random_batches_compile_each_kernel_three_times_at_most():
    compiled = _run("--batches", "50")
    assert {"attention_forward", "attention_backward_dq", "gram_forward", "gram_backward"} <= compiled.keys()
    assert max(compiled.values()) <= 3, compiled


def test_a_call_takes_less_host_time_than_through_the_operators():
    """A wide bound: the machines of tests are busy. The figures themselves: kernels/README.md."""
    found = _run("--repeats", "60")
    assert found["attention: forward and backward"] < 0.8 * found["attention: as before"], found


def test_what_is_launched_again_without_asking_triton():
    """Everything that Triton specialises on is in the key, or there is no key."""
    aligned = torch.zeros(64, dtype=torch.float16)
    key = regular((aligned,), (16, 32), (33, 64))
    assert key == (torch.float16, None, 0, 16)
    others = [
        regular((aligned.float(),), (16, 32), (33, 64)),
        regular((aligned,), (16, 32), (32, 64)),
        regular((aligned,), (16, 32), (1, 64)),
        regular((aligned,), (16, 32), (33, 1)),
    ]
    assert key not in others and len(set(others)) == 4
    assert regular((aligned[1:],), (16,), (33,)) is None
    assert regular((aligned,), (16, 8), (33,)) is None
    assert regular((aligned,), (16, 2**31), (33,)) is None


def test_the_short_way_takes_no_second_derivative():
    x = torch.zeros(4, 1, 16, requires_grad=True)
    out = mixed_attention(x, x, x, intervals_of(((text(4),),)), impl="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
