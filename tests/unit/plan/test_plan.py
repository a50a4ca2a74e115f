"""The planner: which layouts it tries, its predictions against closed forms, what it prints, and its page."""

import itertools
import json
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from unit.plan import test_dry_run as by_hand

from laver_mcore.accounting.devices import GIB, GPUS
from laver_mcore.accounting.typical import typical_mix, typical_work
from laver_mcore.config.checks import check, check_world
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import from_recipe, parse, resolve
from laver_mcore.plan.__main__ import main
from laver_mcore.plan.layouts import MICRO_BATCHES, NODE, RECOMPUTE, VIRTUAL, Layout, candidates, refusal
from laver_mcore.plan.predict import predict
from laver_mcore.plan.report import flags
from laver_mcore.plan.search import search
from laver_mcore.plan.setting import ASSUMED, BEST, WORST, Setting

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = REPOSITORY / "examples/qwen2.5-7b-siglip2/stage2.yaml"
PAGE = REPOSITORY / "docs/planner.md"
ONE = Layout(tp=1, pp=1, vp=1, cp=1, dp=1, micro_batch=1, recompute=None)


@pytest.fixture(scope="module")
def config():
    return resolve(from_recipe(RECIPE))


def setting_of(config, num_gpus, gpu="a100-80gb"):
    return Setting(
        gpu=GPUS[gpu], num_gpus=num_gpus, mix=typical_mix(config), vocab_size=152064, matmul_efficiency=0.5
    )


def predicted(config, layout, gpu="a100-80gb"):
    return predict(layout.apply(config), layout, setting_of(config, layout.model_size * layout.dp, gpu))


@pytest.mark.parametrize("num_gpus", [1, 12, 16])
def test_every_layout_is_tried_once(config, num_gpus):
    found = Counter(candidates(config, num_gpus))
    expected = set()
    sizes = range(1, num_gpus + 1)
    for tp, cp, pp in itertools.product(sizes, repeat=3):
        if num_gpus % (tp * cp * pp) or NODE % (tp * cp) or 28 % pp:
            continue
        for vp, micro_batch, recompute in itertools.product(VIRTUAL, MICRO_BATCHES, RECOMPUTE):
            if 28 % (pp * vp) == 0 and (vp == 1 or pp > 1):
                dp = num_gpus // tp // cp // pp
                sizes_of = dict(tp=tp, pp=pp, vp=vp, cp=cp, dp=dp)
                expected.add(Layout(**sizes_of, micro_batch=micro_batch, recompute=recompute))
    assert set(found) == expected
    assert set(found.values()) == {1}


def test_what_is_ranked_is_what_the_run_accepts(config):
    plan = search(config, setting_of(config, 16))
    assert len(plan.feasible) + sum(plan.refused.values()) == len(list(candidates(config, 16)))
    for found in plan.feasible:
        applied = found.layout.apply(config)
        check(applied)
        assert check_world(applied, 16) == found.layout.dp
        assert found.peak_memory < GPUS["a100-80gb"].memory
    seconds = [found.seconds for found in plan.feasible]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (replace(ONE, tp=8, dp=2), "num_attention_heads=28 is not divisible"),
        (replace(ONE, pp=3, dp=1), "num_layers=28 is not divisible by 3 pipeline chunks"),
        (replace(ONE, dp=16, micro_batch=16), "global_batch_size=128 is not divisible"),
        (replace(ONE, dp=2), None),
    ],
    ids=["heads", "layers", "batch", "fine"],
)
def test_refusal(config, layout, said):
    why = refusal(layout.apply(config), layout.model_size * layout.dp)
    assert (why is None) if said is None else why.startswith(said)


@pytest.mark.parametrize(("pp", "vp"), [(1, 1), (2, 1), (4, 1), (4, 7)], ids=str)
def test_bubble(config, pp, vp):
    """(p - 1) / (v m) of the time without it (Narayanan et al., arXiv 2104.04473)."""
    found = predicted(config, replace(ONE, pp=pp, vp=vp, dp=2))
    busy = found.compute + found.traffic + found.accumulation + found.launches
    busy += found.tp_comm + found.cp_comm + found.pp_comm
    assert found.bubble / busy == pytest.approx((pp - 1) / vp / (128 / 2))


@pytest.mark.parametrize("dp", [1, 2, 16])
def test_data_parallel_volume(config, dp):
    """A ring sends (n - 1) / n of fp32 gradients and of bf16 parameters."""
    found = predicted(config, replace(ONE, tp=2, dp=dp))
    trained = found.memory[0].gradients / 4
    assert found.volumes["data_parallel"] == pytest.approx((4 + 2) * trained * (dp - 1) / dp)
    assert found.memory[0].optimizer == pytest.approx(12 * trained / dp, rel=1e-6)


def test_overlap_hides_collectives(config):
    def exposed(**flags):
        changed = replace(config, parallel=replace(config.parallel, **flags))
        return predicted(changed, replace(ONE, tp=2, dp=8)).dp_comm

    nothing = exposed(overlap_grad_reduce=False, overlap_param_gather=False)
    reduction = exposed(overlap_grad_reduce=True, overlap_param_gather=False)
    both = exposed(overlap_grad_reduce=True, overlap_param_gather=True)
    assert 0 <= both < reduction < nothing


def test_tensor_parallel_volume(config):
    """Megatron's sequence parallelism: in each layer 4 collectives of S D (t - 1) / t forward, and 6 backward."""
    found = predicted(config, replace(ONE, tp=4))
    rows, reconstruction, width, micro_batches = 2048 + 1536, 1536, 3584, 128
    each = 28 * width * 2 * 3 / 4
    assert found.volumes["tensor_parallel"] == pytest.approx(
        micro_batches * each * (10 * rows + 4 * reconstruction)
    )
    nvlink = ASSUMED.link * GPUS["a100-80gb"].nvlink
    assert found.tp_comm == pytest.approx(found.volumes["tensor_parallel"] / nvlink)


def test_context_parallel_volume(config):
    """Ulysses: queries, keys, values in and outputs out, of the rank's rows, to the other ranks; there and back."""
    found = predicted(config, replace(ONE, cp=4))
    rows, teacher, micro_batches = (2048 + 1536) / 4, 1536 / 4, 128
    each = 28 * (28 + 4 + 4 + 28) * 128 * 2 * 3 / 4
    assert found.volumes["context_parallel"] == pytest.approx(micro_batches * each * (2 * rows + teacher))
    assert found.memory[0].optimizer == predicted(config, replace(ONE, dp=4)).memory[0].optimizer


@pytest.mark.parametrize("gpu", GPUS)
def test_predictions_stay_below_the_assumed_rates(config, gpu):
    found = predicted(config, replace(ONE, tp=2, dp=8), gpu)
    assert 0.2 < found.mfu < max(0.5, *GPUS[gpu].attention)
    ideal = found.tokens_per_second_per_gpu * found.seconds * 16
    assert ideal == pytest.approx(128 * 2048)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_compute(config, recompute):
    """FLOPs counted by hand (test_dry_run.py) at the assumed rates; the slowest of two stages sets the pace.

    The teacher's vision head, 0.1 % of a stage, is taken to be spread over the stages like the rest of its pass.
    """
    tp, gpu = 2, GPUS["a100-80gb"]
    found = predicted(config, Layout(tp=tp, pp=2, vp=1, cp=1, dp=4, micro_batch=2, recompute=recompute))
    matrices, (forward, backward) = (
        0.5 * gpu.tflops * 1e12,
        (share * gpu.tflops * 1e12 for share in gpu.attention),
    )
    _, attention_forward, attention_backward = by_hand.attention_flops(recompute)
    decoder = by_hand.decoder_flops(recompute)[1] / matrices
    decoder += attention_forward / forward + attention_backward / backward
    spread = tp * 2 * by_hand.VISUAL * by_hand.VISION_HEAD
    (_, first), (_, last) = by_hand.edge_flops(tp)
    everywhere = (decoder + spread / matrices) / 2
    stages = [(everywhere + edge / matrices) / tp for edge in (first, last - spread)]
    assert found.compute == pytest.approx(by_hand.MICRO_BATCHES * max(stages), rel=1e-9)
    useful = 64 * by_hand.useful_flops()
    assert found.mfu == pytest.approx(useful / found.seconds / 16 / (gpu.tflops * 1e12), rel=1e-9)


def test_traffic(config):
    """Tensors that a layer's operations read (r) and write (w) between its products, by hand, at the memory's rate."""
    tp, width, ffn, heads, groups = 2, 3584, 18944 // 2, 3584 // 2, 512 // 2
    found = predicted(config, replace(ONE, tp=tp, dp=8))
    norm, added, bias, rotated = 2 * width, 3 * width, 2 * (heads + 2 * groups), 2 * (heads + groups)
    forward = (2 * norm + 2 * added) / tp + bias + rotated + (2 + 1) * ffn  # SwiGLU: r 2 F, w F
    # Norms r x and dy, w dx; residual gradients are summed; bias r; d(qkv) is put together; SwiGLU r 2 F, dF, w 2 F.
    backward = (2 * 3 * width + 2 * added) / tp + (heads + 2 * groups) + bias + rotated + (2 + 1 + 2) * ffn
    student, teacher, micro_batches = 2048 + 1536, 1536, 128 / 8
    moved = 28 * 2 * ((forward + backward) * student + forward * teacher)
    rate = 0.8 * GPUS["a100-80gb"].memory_bandwidth
    assert found.traffic == pytest.approx(micro_batches * moved / rate, rel=1e-9)


def test_gradients_are_added_up_once_a_micro_batch(config):
    """bf16 written and read, the fp32 sum read and written: 12 bytes a parameter that trains."""
    one, two = (predicted(config, replace(ONE, tp=2, dp=8, micro_batch=n)) for n in (1, 2))
    _, trained, _ = by_hand.parameters(2, 1, 0)
    rate = 0.8 * GPUS["a100-80gb"].memory_bandwidth
    assert one.accumulation == pytest.approx(16 * 12 * trained / rate, rel=1e-9)
    assert two.accumulation == pytest.approx(one.accumulation / 2)
    assert two.launches == pytest.approx(one.launches / 2)
    assert one.launches == pytest.approx(16 * 2e-6 * (28 * (12 + 36 + 12) + 27 * 12))


# GPU, GPUs, micro-batch, rows a step, recompute -> MFU that llm-foundry publishes for MPT-7B and rows of 2,048 tokens.
PUBLISHED = {
    "8 x A100-80G": ("a100-80gb", 8, 6, 96, None, 0.6423),
    "16 x A100-40G": ("a100-40gb", 16, 16, 256, "full", 0.5044),
    "8 x H100": ("h100-80gb", 8, 6, 48, None, 0.4644),
}


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "rows", "batch", "recompute", "mfu"), PUBLISHED.values(), ids=PUBLISHED
)
def test_published_runs_lie_within_the_range(gpu, num_gpus, rows, batch, recompute, mfu):
    """Llama-2-7B has MPT-7B's width and depth, and 33,024 for 32,768 columns of the MLP.

    They count attention's pairs twice, those behind the diagonal as well: 12 L D S a token where 6 L D S are computed.
    """
    text = "--dry-run --vision none --model llama2-7b --vocab-size 50432 --seq-length 2048 --bf16 --train-iters 1 "
    text += f"--data-path x --tokenizer-model x --global-batch-size {batch} --use-distributed-optimizer "
    config, _ = parse([*text.split(), "--overlap-grad-reduce", "--overlap-param-gather"])
    layout = replace(ONE, dp=num_gpus, micro_batch=rows, recompute=recompute)
    config = layout.apply(config)
    mix = typical_mix(config, supervised_share=1.0)
    setting = Setting(
        gpu=GPUS[gpu], num_gpus=num_gpus, mix=mix, vocab_size=50432, matmul_efficiency=GPUS[gpu].matmul
    )
    worst, best = (predict(config, layout, replace(setting, rates=r)).mfu for r in (WORST, BEST))
    products, attention = 6 * 6658859008, 12 * 32 * 4096 * 2048
    assert worst < mfu * (products + attention / 2) / (products + attention) < best


FLAGS = [
    replace(ONE, tp=2, dp=8, micro_batch=4),
    replace(ONE, pp=4, vp=7, dp=4, recompute="full"),
    replace(ONE, cp=2, dp=8, recompute="selective"),
    replace(ONE, tp=4, pp=4),
]


@pytest.mark.parametrize("layout", FLAGS, ids=str)
def test_flags_make_the_layout_of_the_recipe(layout):
    """Pasted behind the recipe, they give what was planned; of the recipe's own layout there are none."""
    recipe, _ = parse(["--config", str(RECIPE), "--dry-run"])
    wanted, words = layout.apply(recipe), flags(recipe, layout)
    assert parse(["--config", str(RECIPE), "--dry-run", *words.split()])[0] == wanted != recipe
    assert flags(wanted, layout) == ""


def test_update(config):
    """Bytes that optimizer and teacher move, at 80 % of the memory's bandwidth; the teacher in one of 125 steps."""
    dp, gpu = 8, GPUS["a100-80gb"]
    found = predicted(config, replace(ONE, dp=dp))
    _, trained, averaged = by_hand.parameters(1, 1, 0)
    rate = 0.8 * gpu.memory_bandwidth * dp
    # A gradient read, master and two moments read and written in fp32, the bf16 weight written.
    assert found.optimizer == pytest.approx((4 + 3 * 8 + 2) * trained / rate, rel=1e-9)
    # Master read, average read and written, copy written; then a ring gathers the copy, 2 bytes a parameter.
    sent = 2 * averaged * (dp - 1) / dp
    move = (4 + 8 + 2) * averaged / rate + sent / (ASSUMED.link * gpu.nvlink)
    assert found.ema == pytest.approx(move / 125, rel=1e-9)
    assert found.volumes["teacher"] == pytest.approx(sent / 125, rel=1e-9)


def test_fullest_rank_has_to_leave_the_reserve(config):
    """4 GiB beside what the fullest rank takes, whichever rank that is."""
    found, gpu = predicted(config, replace(ONE, pp=2)), GPUS["h200"]
    assert len({memory.total for memory in found.memory}) == 2
    largest = max(memory.total for memory in found.memory)
    for memory in (found.memory, found.memory[::-1]):
        turned = replace(found, memory=memory)
        assert turned.peak_memory == largest
        assert turned.fits(replace(gpu, memory=largest + 4 * GIB))
        assert not turned.fits(replace(gpu, memory=largest + 4 * GIB - 1))


@pytest.mark.parametrize(
    "less",
    [dict(tp=2), dict(pp=2), dict(cp=2), dict(dp=2), dict(recompute="full")],
    ids=["tp", "pp", "cp", "dp", "recompute"],
)
def test_parallelism_saves_memory(config, less):
    config = replace(config, train=replace(config.train, global_batch_size=1024))
    assert predicted(config, replace(ONE, **less)).peak_memory < predicted(config, ONE).peak_memory


def test_typical_work(config):
    config = replace(config, train=replace(config.train, micro_batch_size=1))
    work = typical_work(config, typical_mix(config))
    assert (work.images, work.visual_tokens, work.dialogue_rows) == (2, 1458, 2048)
    assert work.student_padding == 78
    assert work.supervised_rows == 590  # all that is no image


def test_too_many_images(config):
    with pytest.raises(ConfigError, match="use at most 2"):
        typical_mix(config, images_per_row=3)


def run_plan(capsys, *argv):
    status = main([str(arg) for arg in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_json_holds_what_is_printed(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["--config", RECIPE, "--gpus", 16, "--gpu", "h200", "--top", 3, "--json", file]
    status, out, _ = run_plan(capsys, *argv)
    assert status == 0
    plan = json.loads(file.read_text())
    best = plan["layouts"][0]
    assert f"{len(plan['layouts'])} layouts fit" in out
    assert f"{best['step_seconds']:.2f}" in out
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert len(best["memory"]) == best["pp"]


def test_nothing_fits(capsys):
    status, out, _ = run_plan(
        capsys, "--config", RECIPE, "--gpus", 8, "--gpu", "a100-40gb", "--model", "qwen2.5-72b"
    )
    assert status == 0
    assert "no layout fits" in out
    assert "the smallest needs" in out
    assert "does not fit into memory" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpus", 0], "gpus=0 must be at least 1"),
        (["--gpus", 8, "--model", "tiny", "--num-layers", 4, "--tensor-model-parallel-size", 1,
          "--no-sequence-parallel"], "add --vocab-size"),
        (["--gpus", 8, "--micro-batches", 3], "unknown flag --micro-batches"),
    ],
    ids=["no_gpus", "no_vocabulary", "unknown_flag"],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, argv, said):
    status, out, err = run_plan(capsys, "--config", RECIPE, "--gpu", "h200", *argv)
    assert status == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_starts_without_torch():
    slow = {"torch", "megatron", "transformers"}
    code = f"import sys, laver_mcore.plan.__main__; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"


def page_examples():
    """(command, what the page says it prints) of every pair of blocks."""
    blocks = PAGE.read_text(encoding="utf-8").split("```")[1::2]
    commands = [i for i, block in enumerate(blocks) if block.startswith("sh\nlaver plan")]
    return [(blocks[i][3:].strip(), blocks[i + 1].removeprefix("text\n").rstrip("\n")) for i in commands]


@pytest.mark.parametrize("number", [0, 1], ids=["paper", "1024"])
def test_page_shows_what_its_commands_print(capsys, monkeypatch, number):
    monkeypatch.chdir(REPOSITORY)
    command, shown = page_examples()[number]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["laver", "plan"]
    assert run_plan(capsys, *words[2:])[:2] == (0, shown + "\n")
