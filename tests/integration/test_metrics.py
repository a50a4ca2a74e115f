"""What a run says about its own speed, and the trace of `--profile`, on a real run."""

import json

import pytest
import sentencepiece
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, read_metrics, run_scenarios

RANGES = ("vision", "teacher", "student", "optimizer", "ema")
PARTS = ("data", *RANGES, "other")
MICRO_BATCHES = 4  # of one row, in the sample recipe
FLAGS = "--train-iters 4 --log-interval 2 --profile --profile-step-start 2 --profile-step-end 4 --ema-steps 1"


QUESTION, ANSWER = "red green blue dark bright left right up", "one two three"
VISUAL = 16  # tokens of an image


def write_equal_samples(directory):
    """Twelve dialogues of one image and the same words: two fill a packed row, so that every step holds the same."""
    write_sample_data(directory, num_samples=12)
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    images = sorted(path.name for path in directory.glob("*.png"))
    records = [{"id": f"s{i}", "conversations": turns, "image": images[i % len(images)]} for i in range(12)]
    (directory / "train.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("metrics")
    write_equal_samples(directory / "data")
    recipe = write_recipe(directory / "data")
    plain = f"--config {recipe} {FLAGS}"
    scenarios = [
        Scenario(name="plain", argv=tuple(plain.split())),
        Scenario(name="peak", argv=tuple(f"{plain} --peak-tflops 2".split())),
    ]
    run_scenarios(1, directory, scenarios)
    return directory


@pytest.mark.parametrize("name", ["plain", "peak"])
def test_parts_make_up_the_step(runs, name):
    rows = read_metrics(runs / name)
    assert [row["iteration"] for row in rows] == [2, 4]
    for row in rows:
        times = {part: row[f"time_{part}_ms"] for part in PARTS}
        assert min(times.values()) >= 0
        assert min(times[part] for part in ("teacher", "student", "optimizer", "ema")) > 0
        assert times["student"] == max(
            times[part] for part in RANGES
        )  # starting and writing a trace is `other`
        step = 1000 * row["step_seconds"]
        assert sum(times.values()) == pytest.approx(step, rel=1e-6)


def test_shares_of_the_peak(runs):
    plain, peak = read_metrics(runs / "plain")[-1], read_metrics(runs / "peak")[-1]
    assert plain["mfu"] is None
    assert plain["hfu"] is None
    assert plain["tflops_per_gpu"] > 0
    assert peak["mfu"] == pytest.approx(peak["tflops_per_gpu"] / 2)
    assert peak["hfu"] > peak["mfu"]
    assert 0 < plain["padding_share"] < 1


def sizes_of(runs):
    """(tokens of a dialogue, tokens that it supervises, vocabulary), from the prompt written out and the tokenizer."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(runs / "data" / "tokenizer.model"))
    image = f"<|vision_start|>{'<|image_pad|>' * VISUAL}<|vision_end|>"
    learned = model.encode(f"{ANSWER}<|im_end|>")
    asked = model.encode(f"<|im_start|>user\n{image}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    return len(asked) + len(learned) + len(model.encode("\n")), len(learned), model.vocab_size()


def flops_of_a_step(length, supervised, vocabulary):
    """(useful, run) FLOPs of eight dialogues of the sample recipe's model, all of which trains.

    2 a weight and row forward and 4 backward; of attention 4 D a pair and layer forward, twice that backward, and half
    of it more where the scores are made again; the teacher's forward besides. LM head and padded vocabulary: 128 rows.
    """
    width, layers, ffn, queries, keys, head = 64, 4, 128, 64, 32, 64
    decoder = layers * (width * (queries + 2 * keys) + queries * width + 3 * width * ffn)
    connector, vision_head = 3 * 8 * 8 * width + 2 * width**2, 3 * head**2
    pairs = length * (length + 1) // 2 + VISUAL * (VISUAL - 1) // 2 + VISUAL**2
    one_pair = 4 * layers * queries
    head_row = 6 * supervised * width
    others = 6 * decoder * (length + VISUAL) + 2 * decoder * VISUAL + one_pair * VISUAL**2
    others += VISUAL * (6 * connector - 2 * 3 * 8 * 8 * width)  # pixels need no gradient
    others += 8 * vision_head * VISUAL + 4 * width * VISUAL**2
    useful = 8 * (others + 3 * one_pair * pairs + head_row * vocabulary)
    # A micro-batch is one row of two dialogues, padded to a multiple of 16; the images fill 32 rows.
    padding = 4 * (-2 * length % 16)
    return useful, 8 * (others + 3.5 * one_pair * pairs + head_row * 128) + 6 * decoder * padding


@pytest.mark.parametrize("name", ["plain", "peak"])
def test_rate_is_work_over_time(runs, name):
    """To the last digits: rows, tokens and FLOPs of a step counted from the data and the model's shapes."""
    length, supervised, vocabulary = sizes_of(runs)
    assert 43 <= length <= 64  # two in a row of 128, and no third
    useful, run = flops_of_a_step(length, supervised, vocabulary)
    padding = 4 * (-2 * length % 16)
    rows = 8 * (length + VISUAL) + padding + 8 * VISUAL  # student's and teacher's
    for row in read_metrics(runs / name):
        seconds = row["step_seconds"]
        assert row["tokens_per_second"] * seconds == pytest.approx(8 * length, rel=1e-9)
        assert row["images_per_second"] * seconds == pytest.approx(8, rel=1e-9)
        assert row["tflops_per_gpu"] * seconds * 1e12 == pytest.approx(useful, rel=1e-9)
        assert row["padding_share"] == pytest.approx(padding / rows, rel=1e-9)
        if name == "peak":
            assert row["hfu"] * 2 * seconds * 1e12 == pytest.approx(run, rel=1e-9)


@pytest.mark.parametrize("name", ["plain"])
def test_trace_names_the_parts(runs, name):
    (file,) = (runs / name / "profile").iterdir()
    assert file.name == "rank0.pt.trace.json"
    events = json.loads(file.read_text())["traceEvents"]
    spans = {
        part: [
            (e["ts"], e["ts"] + e["dur"])
            for e in events
            if e.get("name") == part and e.get("ph") == "X" and "user_annotation" in e["cat"]
        ]
        for part in RANGES
    }
    for part in ("student", "optimizer", "ema"):
        assert len(spans[part]) == 2, part  # iterations 2 and 3
    for part in ("vision", "teacher"):  # once a micro-batch, within the student's pass
        assert 2 <= len(spans[part]) <= 2 * MICRO_BATCHES, part
        for start, stop in spans[part]:
            assert any(first <= start and stop <= last for first, last in spans["student"]), part


def test_line_in_megatrons_form():
    from laver_mcore.train.lines import megatron_line

    row = {"iteration": 3, "learning_rate": 1e-3, "skipped": 0, "tflops_per_gpu": 412.34, "loss": 1.0}
    line = megatron_line(row, 10, 4, 0.5)
    assert "| throughput per GPU (TFLOP/s/GPU): 412.3 |" in line
    assert "elapsed time per iteration (ms): 500.0 |" in line
