"""The presets have the published parameter counts, counted on the built model, no weight allocated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laver_mcore.config.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[3]

# Published number of parameters of the language model alone.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "vicuna-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
}
# Tensor x pipeline sizes of the pretended ranks; together they hold every parameter exactly once.
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2_pp2": (2, 2)}

# The model needs a process group; a pretended one has a process of its own.
COUNT = """
import json, resource, sys, warnings
warnings.filterwarnings("ignore")
from laver_mcore.megatron import cpu, parallel
from laver_mcore.config.load import parse
from laver_mcore.accounting.memory import holdings
from laver_mcore.cli.dry_run import _pretend, describe_rank
from laver_mcore.model.parameters import Training, merge_parts

cpu.install("meta")
counts = {}
for name, tp, pp in json.loads(sys.argv[1]):
    flags = f"--model {name} --vision none --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --bf16"
    flags += f" --make-vocab-size-divisible-by {128 // tp}"  # 151,936 is no multiple of 256: TP 2 would pad it
    config, _ = parse([*flags.split(), "--data-path", "none.json", "--tokenizer-model", "none"])
    vocab_size = config.model.vocab_size
    rows = [describe_rank(config, _pretend(config, tp * pp, stage * tp), vocab_size) for stage in range(pp)]
    table = merge_parts([contribution for _, contribution in rows], Training(trainable=("*",)))
    counts[f"{name}-{tp}-{pp}"] = [sum(total for _, total, _ in table), [number for number, _ in rows]]
    counts[f"{name}-{tp}-{pp}"].append([held.all for held in holdings(config, vocab_size)])
parallel.shut_down()
counts["peak_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counts():
    plan = [(name, *layout) for name in PUBLISHED for layout in LAYOUTS.values()]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(plan)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(counts, name, layout):
    tp, pp = LAYOUTS[layout]
    assert counts[f"{name}-{tp}-{pp}"][0] == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_stages_hold_everything_once_but_a_tied_embedding_twice(counts, name):
    shape = PRESETS[name]
    copy = 0 if shape["untie_embeddings_and_output_weights"] else shape["vocab_size"] * shape["hidden_size"]
    assert sum(counts[f"{name}-1-2"][1]) == PUBLISHED[name] + copy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_arithmetic_finds_every_ranks_parameters(counts, name, layout):
    tp, pp = LAYOUTS[layout]
    _, built, listed = counts[f"{name}-{tp}-{pp}"]
    assert listed == built


def test_no_weights_are_allocated(counts):
    assert counts["peak_kib"] * 1024 < PUBLISHED["qwen2.5-7b"] * 2 / 4
