"""What every call refuses, in one sentence that names what was given and wanted; and life without Triton."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from laver_kernels import (
    Intervals,
    backend,
    ema_update_,
    gram_loss,
    latent_cross_entropy,
    linear_cross_entropy,
    mixed_attention,
)
from laver_kernels.testing_masks import intervals_of, text

INTERVALS = intervals_of(((text(6),),))
LONG = torch.int64


def x(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def attention(q, k, v, intervals=INTERVALS, rope=None, **keywords):
    return mixed_attention(q, k, v, intervals, rope, impl="reference", **keywords)


def rows(*values):
    return torch.tensor(values, dtype=LONG)


BAD = {
    "q not a tensor": (lambda: attention([1], 0, 0), "q_THD is a list, want a tensor"),
    "q rank": (
        lambda: attention(x(6, 16), x(6, 1, 16), x(6, 1, 16)),
        r"q_THD has shape \[6, 16\], want \[T, H, D\]",
    ),
    "q integer": (
        lambda: attention(x(6, 1, 16, dtype=LONG), x(6, 1, 16), x(6, 1, 16)),
        "q_THD is torch.int64, want",
    ),
    "k dtype": (
        lambda: attention(x(6, 2, 16), x(6, 1, 16).half(), x(6, 1, 16)),
        "k_TGD is torch.float16, want torch.float32",
    ),
    "k length": (
        lambda: attention(x(6, 2, 16), x(5, 1, 16), x(6, 1, 16)),
        r"k_TGD has shape \[5, 1, 16\], want \[6, G, 16\]",
    ),
    "v heads": (
        lambda: attention(x(6, 2, 16), x(6, 1, 16), x(6, 2, 16)),
        r"v_TGD has shape \[6, 2, 16\], want \[6, 1, 16\]",
    ),
    "head multiple": (
        lambda: attention(x(6, 3, 16), x(6, 2, 16), x(6, 2, 16)),
        "3 query heads over 2 key/value heads, want a multiple",
    ),
    "head dim odd": (
        lambda: attention(x(6, 1, 15), x(6, 1, 15), x(6, 1, 15)),
        "head dim 15 is not supported",
    ),
    "head dim large": (
        lambda: attention(x(6, 1, 256), x(6, 1, 256), x(6, 1, 256)),
        "head dim 256 is not supported, want an even one up to 128",
    ),
    "intervals type": (
        lambda: attention(x(6, 1, 16), x(6, 1, 16), x(6, 1, 16), (1, 2)),
        "intervals is a tuple",
    ),
    "intervals length": (
        lambda: attention(x(5, 1, 16), x(5, 1, 16), x(5, 1, 16)),
        "intervals of 6 tokens on cpu, want 5 on cpu",
    ),
    "rope type": (
        lambda: attention(*[x(6, 1, 16)] * 3, rope=x(6, 8)),
        "rope is a Tensor, want .cos_TF, sin_TF.",
    ),
    "rope dtype": (
        lambda: attention(*[x(6, 1, 16)] * 3, rope=(x(6, 8), x(6, 8).half())),
        "rope sin_TF is torch.float16, want torch.float32",
    ),
    "rope shape": (
        lambda: attention(*[x(6, 1, 16)] * 3, rope=(x(6, 16), x(6, 8))),
        r"rope cos_TF has shape \[6, 16\], want \[6, 8\]",
    ),
    "scale": (
        lambda: attention(*[x(6, 1, 16)] * 3, softmax_scale=-1.0),
        "softmax_scale=-1.0, want a positive",
    ),
    "gram teacher": (
        lambda: gram_loss(x(4, 8), x(4, 7), (4,)),
        r"teacher_NK has shape \[4, 7\], want \[4, 8\]",
    ),
    "gram dtype": (lambda: gram_loss(x(4, 8), x(4, 8).half(), (4,)), "teacher_NK is torch.float16"),
    "gram sum": (lambda: gram_loss(x(4, 8), x(4, 8), (3, 2)), r"image_lengths=\(3, 2\), want .* sum to N=4"),
    "gram negative": (lambda: gram_loss(x(4, 8), x(4, 8), (5, -1)), "want non-negative integers"),
    "gram tensor": (
        lambda: gram_loss(x(4, 8), x(4, 8), rows(4)),
        "image_lengths is a tensor, want host integers",
    ),
    "latent rows dtype": (
        lambda: latent_cross_entropy(x(4, 8), x(4, 8), rows(1).int()),
        "rows_M is torch.int32, want torch.int64",
    ),
    "latent rows range": (
        lambda: latent_cross_entropy(x(4, 8), x(4, 8), rows(1, 4)),
        r"rows_M reaches \[1, 4\], want within \[0, 4\)",
    ),
    "latent rows twice": (lambda: latent_cross_entropy(x(4, 8), x(4, 8), rows(1, 1)), "gives a row twice"),
    "latent centre": (
        lambda: latent_cross_entropy(x(4, 8), x(4, 8), rows(1), center_K=x(4)),
        r"center_K has shape \[4\], want \[8\]",
    ),
    "latent temperature": (
        lambda: latent_cross_entropy(x(4, 8), x(4, 8), rows(1), student_temperature=0.0),
        "temperatures student=0.0, teacher=0.04, want > 0",
    ),
    "ema dtype": (
        lambda: ema_update_(x(4).bfloat16(), x(4), 0.9),
        "average is torch.bfloat16, want torch.float32",
    ),
    "ema shape": (lambda: ema_update_(x(4), x(5), 0.9), r"source has shape \[5\], want \[4\]"),
    "ema momentum": (lambda: ema_update_(x(4), x(4), 1.5), r"momentum=1.5, want within \[0, 1\]"),
    "ema momentum tensor": (
        lambda: ema_update_(x(4), x(4), x(2)),
        r"momentum is torch.float32 \[2\], want one",
    ),
    "head width": (
        lambda: linear_cross_entropy(x(4, 8), x(9, 7), rows(0, 0, 0, 0)),
        r"weight_VD has shape \[9, 7\], want \[V, 8\]",
    ),
    "head target": (
        lambda: linear_cross_entropy(x(2, 8), x(9, 8), rows(0, 9)),
        r"targets_N reaches \[0, 9\], want within \[0, 9\)",
    ),
    "head padded target": (
        lambda: linear_cross_entropy(x(2, 8), x(9, 8), rows(0, 8), vocab_size=8),
        r"targets_N reaches \[0, 8\], want within \[0, 8\)",
    ),
    "head vocabulary": (
        lambda: linear_cross_entropy(x(1, 8), x(9, 8), rows(0), vocab_size=10),
        "vocab_size=10, want at most the 9 rows",
    ),
    "head chunk": (lambda: linear_cross_entropy(x(1, 8), x(9, 8), rows(0), chunk_rows=0), "chunk_rows=0"),
    "impl": (
        lambda: gram_loss(x(4, 8), x(4, 8), (4,), impl="cuda"),
        "impl='cuda' is unknown; use one of auto",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_value_error(name):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_triton_refuses_fp64():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's message; fp64 on CUDA is refused alike")
    q = x(6, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' got torch.float64, want fp16, bf16 or fp32"):
        mixed_attention(q, q, q, INTERVALS, impl="triton")


WITHOUT_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import torch
import laver_kernels as lk
from laver_kernels.testing import attention_problem, check, gram_problem, head_problem, latent_problem
from laver_kernels.testing_masks import image, text

documents = ((text(9), image(12)), (image(6), text(8)))
for problem in (
    attention_problem("x", documents),
    gram_problem("x", (5, 9)),
    latent_problem("x", 9, (1, 4)),
    head_problem("x", 5, 20),
):
    check(problem, "auto")
average = torch.zeros(3)
lk.ema_update_(average, torch.ones(3), 0.5)
assert average.tolist() == [0.5] * 3
try:
    lk.gram_loss(torch.zeros(4, 8), torch.zeros(4, 8), (4,), impl="triton")
except ValueError as error:
    assert "is not installed" in str(error), error
else:
    raise AssertionError("impl='triton' ran without Triton")
assert "triton" not in sys.modules
print("ran without Triton")
"""


def test_without_triton_the_reference_runs(request):
    kernels = request.config.rootpath / "kernels"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, str(kernels)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "ran without Triton" in done.stdout


WITHOUT_INTERPRETER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, laver_kernels
try:
    laver_kernels.gram_loss(torch.zeros(4, 8), torch.zeros(4, 8), (4,), impl="triton")
except ValueError as error:
    print(error)
"""


def test_triton_on_cpu_tensors_says_what_it_needs(request, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = request.config.rootpath / "kernels"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERPRETER, str(kernels)], capture_output=True, text=True, timeout=120
    )
    assert "needs CUDA tensors, got cpu" in done.stdout


def test_falling_back_is_said_once(caplog):
    backend._announce.cache_clear()
    with caplog.at_level("WARNING", logger="laver_kernels"):
        for _ in range(3):
            gram_loss(x(4, 8), x(4, 8), (4,))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("gram_loss runs the PyTorch reference: Triton")


DEVICES = {
    "CPU": ("cpu", None, (0, 0), "reference (Triton needs CUDA tensors, got cpu)"),
    "Ampere": ("cuda", None, (8, 0), "triton"),
    "Hopper": ("cuda", None, (9, 0), "triton"),
    "Turing": (
        "cuda",
        None,
        (7, 5),
        "reference (Triton needs sm_80 or newer (bf16 tensor cores), got sm_75)",
    ),
    "AMD": ("cuda", "6.4", (9, 4), "reference (Triton has no configurations for AMD GPUs here)"),
}


@pytest.mark.parametrize("name", DEVICES)
def test_one_decision_for_a_device_is_what_a_program_announces(name, monkeypatch, caplog):
    pytest.importorskip("triton")
    device_type, hip, capability, words = DEVICES[name]
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device(device_type)
    assert str(backend.decide("auto", device)) == words
    assert str(backend.decide("reference", device)) == "reference"
    assert not caplog.records
    if not words.startswith("triton") and device_type == "cuda":
        with pytest.raises(ValueError, match=r"kernels: impl='triton' (needs sm_80|has no configurations)"):
            backend.decide("triton", device)


def test_the_decision_for_a_gpu_breaks_no_graph(monkeypatch):
    pytest.importorskip("triton")
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def shift(tensor):
        return tensor + 1 if backend.decide("auto", torch.device("cuda", 0)).impl == "triton" else tensor

    torch._dynamo.reset()
    assert torch.compile(shift, backend="aot_eager", fullgraph=True)(torch.zeros(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize("rope", [(), x(6, 8), (x(6, 8),)], ids=["none", "a tensor", "one table"])
def test_a_table_that_is_no_pair_is_refused_after_a_call_that_was_right(rope):
    """The same mask and shapes have been checked before: what goes without a second look is not the table's kind."""
    q = x(6, 1, 16)
    ends = torch.arange(1, 7, dtype=torch.int32)
    seen = Intervals.from_rows(torch.zeros_like(ends), ends)
    mixed_attention(q, q, q, seen)
    mixed_attention(q, q, q, seen, (x(6, 8), x(6, 8)))
    with pytest.raises(ValueError, match=r"rope is a \w+, want .cos_TF, sin_TF."):
        mixed_attention(q, q, q, seen, rope)
