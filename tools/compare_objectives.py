"""One recipe, several objectives: held-out accuracy, likeness of visual tokens by layer, time and memory, side by side.

    python tools/compare_objectives.py --data data/demo --output runs/compare
    python tools/compare_objectives.py --viral-target models/dinov2-base --steps 520

All arms have the recipe's data, seeds and steps, and start from one stage 1 (ViCToR's from one of its own, with visual
tokens of unit length). They are trained in turns, a part of the steps each, so that times are of one machine in one
run. The same command goes on where it was stopped. Writes report.md, report.png, summary.json.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from laver_mcore.demo.results import digit_accuracy

WARM_UP = 3
"""Steps of every turn whose time does not count."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train and compare objectives."""

    data: Path = Path("data/demo")
    """Folder of tools/prepare_demo.py."""
    output: Path = Path("runs/compare")
    """Folder of all runs and of the report."""
    align: Path = Path("examples/demo/stage1.yaml")
    """Recipe of the stage that all start from."""
    recipe: Path = Path("examples/demo/stage2.yaml")
    """Recipe of the stage that is compared."""
    align_steps: int | None = None
    """Steps of the first; the recipe's own where not given."""
    steps: int = 520
    """Steps of each arm."""
    turns: int = 4
    """Parts that the steps are trained in."""
    viral_target: Path | None = None
    """Hugging Face directory of DINOv2; VIRAL is left out without it."""
    viral_layers: tuple[int, ...] = (2,)
    """Decoder layers that VIRAL aligns."""
    pool_size: int = 64
    """Rows of ViCToR's pool."""
    similarity_samples: int = 64
    """Held-out images whose tokens are compared, layer by layer."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One objective: what it is called, its flags, and its folder."""

    title: str
    flags: tuple[str, ...]
    name: str
    align: str = "stage1"


def arms_of(arguments: Arguments) -> list[Arm]:
    """All arms that can run."""
    arms = [
        Arm(name="lm", title="LM alone", flags=("--objective", "lm")),
        Arm(name="laver_mim", title="LaVer, MIM", flags=("--objective", "laver", "--gram", "off")),
        Arm(name="laver_ga", title="LaVer, MIM + GA", flags=("--objective", "laver", "--gram", "ga")),
        Arm(name="laver_cga", title="LaVer, MIM + CGA", flags=("--objective", "laver", "--gram", "cga")),
        Arm(
            name="victor",
            title="ViCToR",
            flags=("--objective", "victor", "--pool-size", str(arguments.pool_size)),
            align="stage1_unit_length",
        ),
    ]
    if arguments.viral_target is not None:
        layers = map(str, arguments.viral_layers)
        target = ("--target-path", str(arguments.viral_target), "--target-layers", *layers)
        arms.append(Arm(name="viral", title="VIRAL", flags=("--objective", "viral", *target)))
    return arms


def run(*command: str) -> int:
    """Run a program of ours with its output in the terminal; returns the most memory it held, in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen((sys.executable, *command), env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, shlex.join(command))
    return usage.ru_maxrss * 1024


def reached(folder: Path) -> int:
    """Iteration of a run's newest checkpoint; 0 where there is none."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text(encoding="utf-8")) if tracker.is_file() else 0


def train_all(arguments: Arguments, arms: list[Arm]) -> None:
    """Every arm to its last step, in turns."""
    tokenizer = ("--tokenizer-model", str(arguments.data / "tokenizer.model"))
    common = (*tokenizer, "--log-interval", "1", "--no-tensorboard")
    for name in dict.fromkeys(arm.align for arm in arms):
        if not reached(arguments.output / name):
            steps = () if arguments.align_steps is None else ("--train-iters", str(arguments.align_steps))
            unit = ("--normalize-visual-tokens", "True") if name != "stage1" else ()
            data = ("--data-path", str(arguments.data / "align.json"))
            save = ("--save", str(arguments.output / name))
            run("pretrain_laver.py", "--config", str(arguments.align), *data, *common, *steps, *unit, *save)
    each = -(-arguments.steps // arguments.turns)
    turns = [
        (arm, min(each * (turn + 1), arguments.steps)) for turn in range(arguments.turns) for arm in arms
    ]
    for arm, stop in tqdm(turns, unit="turn", disable=None):
        folder = arguments.output / arm.name
        if reached(folder) >= stop:
            continue
        if reached(folder):
            start = ("--load", str(folder))
        else:
            start = ("--pretrained-checkpoint", str(arguments.output / arm.align))
        length = ("--train-iters", str(arguments.steps), "--exit-interval", str(each))
        data = ("--data-path", str(arguments.data / "train.json"))
        recipe = ("--config", str(arguments.recipe), *data, *common, *length, "--save", str(folder))
        most = run("pretrain_laver.py", *recipe, *arm.flags, *start)
        (folder / "memory.json").write_text(json.dumps({"peak_bytes": most}), encoding="utf-8")


def step_seconds(folder: Path, turn: int) -> float:
    """Median time of a step, without the first ones of every turn."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [row["step_seconds"] for row in rows if (row["iteration"] - 1) % turn >= WARM_UP]
    return statistics.median(times or [row["step_seconds"] for row in rows])


def similarity_by_layer(folder: Path, data: Path, num_samples: int) -> list[float]:
    """Mean cosine between tokens of one image after each decoder layer, over held-out images."""
    from laver_mcore.config.load import from_recipe, resolve
    from laver_mcore.convert.probe import probe
    from laver_mcore.data.images.decode import open_image
    from laver_mcore.data.records.conversation import load_records
    from laver_mcore.data.sequence.batch import collate
    from laver_mcore.data.sequence.prompt import encode_prompt
    from laver_mcore.megatron import parallel
    from laver_mcore.objectives.similarity import num_similar_images, similarity_sum
    from laver_mcore.train.build import (
        build_image_processor,
        build_network,
        build_tokenizer,
        resolve_vocab_size,
    )

    config = resolve(from_recipe(folder / "config.yaml"))
    tokenizer, processor = build_tokenizer(config), build_image_processor(config)
    assert processor is not None
    topology = parallel.build_topology(config.parallel, parallel.init_distributed())
    network = build_network(config, topology, resolve_vocab_size(config, tokenizer), folder)
    records = [sample for sample in load_records(data, data.parent) if sample.images][:num_samples]
    prompts, images = [], []
    for sample in records:
        opened = [open_image(path) for path in sample.images]
        grids = [processor.grid(*image.size) for image in opened]
        system = config.data.system_prompt
        prompts.append(encode_prompt(sample.turns[:1], grids, tokenizer, system_prompt=system))
        images += opened
    batch = collate(
        prompts,
        [""] * len(prompts),
        total_length=sum(map(len, prompts)),
        pad_id=tokenizer.special.pad,
        pixels=processor(images),
    )
    found = probe(network.chunks, batch, network.geometry, topology, network.vocab_size)
    count, rows = max(1, num_similar_images(batch.image_lengths)), batch.visual_rows_N
    return [
        similarity_sum(states_TD[rows], batch.image_lengths).item() / count
        for states_TD in found.layers.values()
    ]


def measure(arguments: Arguments, arms: list[Arm]) -> dict[str, Any]:
    """Everything that the report says, by arm."""
    heldout = arguments.data / "heldout.json"
    waiting = [arm for arm in arms if not (arguments.output / arm.name / "answers.jsonl").is_file()]
    if waiting:
        folders = [str(arguments.output / arm.name) for arm in waiting]
        run("tools/evaluate.py", "--checkpoint", *folders, "--data", str(heldout), "--max-new-tokens", "20")
    each, found = -(-arguments.steps // arguments.turns), {}
    for arm in tqdm(arms, desc="measuring", unit="arm", disable=None):
        folder = arguments.output / arm.name
        rows = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        found[arm.name] = {
            "title": arm.title,
            "accuracy": digit_accuracy(folder / "answers.jsonl"),
            "lm_loss": json.loads(rows[-1])["lm_loss"],
            "similarity": similarity_by_layer(folder, heldout, arguments.similarity_samples),
            "step_seconds": step_seconds(folder, each),
            "peak_bytes": json.loads((folder / "memory.json").read_text("utf-8"))["peak_bytes"],
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The report's table; time as a multiple of the language model's."""
    base = found["lm"]["step_seconds"]
    lines = [
        "| | accuracy per digit | LM loss | likeness, first layer | last layer | time of a step | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found.values():
        lines.append(
            f"| {row['title']} | {row['accuracy']:.1%} | {row['lm_loss']:.3f} | {row['similarity'][0]:.3f} "
            f"| {row['similarity'][-1]:.3f} | {row['step_seconds'] / base:.2f} | {row['peak_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, found: dict[str, Any]) -> None:
    """Accuracy, likeness by layer, and time, in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), dpi=110, layout="constrained")
    accuracy, likeness, time = figure.subplots(1, 3)
    titles = [row["title"] for row in found.values()]
    for axis, name, values in (
        (accuracy, "Held-out accuracy per digit", [row["accuracy"] for row in found.values()]),
        (time, "Time of a step, LM alone = 1",
         [row["step_seconds"] / found["lm"]["step_seconds"] for row in found.values()]),
    ):  # fmt: skip
        bars = axis.barh(titles, values, color="#1f5fbf")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(name)
    for row in found.values():
        layers = range(1, len(row["similarity"]) + 1)
        likeness.plot(layers, row["similarity"], marker="o", label=row["title"])
    likeness.set_title("Mean cosine between an image's tokens")
    likeness.set_xlabel("decoder layer")
    likeness.xaxis.get_major_locator().set_params(integer=True)
    likeness.legend(fontsize=8)
    figure.savefig(path)


def main() -> int:
    """Command line; returns the exit status of the first step that failed, else 0."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arms = arms_of(arguments)
    try:
        train_all(arguments, arms)
        found = measure(arguments, arms)
    except subprocess.CalledProcessError as error:
        print(
            f"compare_objectives.py: error: {error.cmd} ended with status {error.returncode}", file=sys.stderr
        )
        return 1
    text = f"# Objectives compared\n\n{arguments.steps} steps each of {arguments.recipe}.\n\n{table(found)}"
    if arguments.viral_target is None:
        text += "\nVIRAL was left out: it needs --viral-target, a Hugging Face directory of DINOv2.\n"
    (arguments.output / "report.md").write_text(text, encoding="utf-8")
    (arguments.output / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw(arguments.output / "report.png", found)
    print(f"\n{text}\npicture: {arguments.output / 'report.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
