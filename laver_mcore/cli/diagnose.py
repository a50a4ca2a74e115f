"""See what trained models do with pictures, any number of them side by side.

    laver diagnose --model RUN HF_DIRECTORY ... --data heldout.json --output diagnosis

A model is the folder of a run, exported on the way, or a directory that mcore_to_hf.py wrote. Writes index.html,
which needs no other file, layers.csv, diagnosis.json and the pictures.
"""

import argparse
import contextlib
import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser, folder_to_write
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.config.schema import ParallelConfig


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("--model", required=True, nargs="+", help="folders of runs, and exported models")
    add(
        "--data",
        required=True,
        help="LLaVA / ShareGPT JSON with one picture a dialogue; the first question of each is asked",
    )
    add("--image-folder", help="folder of the images; the data file's own folder where not given")
    add("--output", type=folder_to_write, default=Path("diagnosis"), help="folder to write")
    add("--num-questions", type=int, default=32, help="at most so many dialogues")
    add(
        "--teacher-of",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs whose EMA teacher is shown, too, and what they make of masked tokens",
    )
    add(
        "--skip",
        nargs="+",
        default=[],
        choices=("accuracy", "states"),
        help="leave out answers to changed pictures, or the map of states: what takes longest",
    )
    add(
        "--encoder",
        help="vision encoder (transformers) that each layer's visual tokens are compared with (CKNNA)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that a given directory brings; what is exported here is our own",
    )
    return parser.parse_args(argv)


def questions(arguments: argparse.Namespace) -> list[Any]:
    """The first question of each dialogue that has one picture and an answer of a word or more."""
    from laver_mcore.data.images.decode import open_image
    from laver_mcore.data.records.conversation import load_records
    from laver_mcore.diagnose.reading import Question

    folder = arguments.image_folder or Path(arguments.data).parent
    found: list[Question] = []
    for sample in load_records(arguments.data, folder):
        turns = [turn for turn in sample.turns if turn.role != "system"]
        answer = turns[1].text.strip() if len(turns) > 1 else ""
        asks = len(sample.images) == 1 and turns[0].num_images == 1 and bool(answer)
        if asks and len(found) < arguments.num_questions:
            question = "".join(turns[0].split()).strip()
            found.append(Question(image=open_image(sample.images[0]), question=question, answer=answer))
    if len(found) < 2:
        raise ConfigError(
            f"{arguments.data}: {len(found)} dialogue(s) with one picture and an answer; two are needed"
        )
    return found


def directories(arguments: argparse.Namespace, scratch: Path) -> dict[str, tuple[Path, bool]]:
    """Name -> (exported directory, whether its code may run)."""
    from laver_mcore.convert.export import export_run

    found: dict[str, tuple[Path, bool]] = {}
    wanted = [(Path(path), False) for path in arguments.model]
    wanted += [(Path(path), True) for path in arguments.teacher_of]
    for number, (given, teacher) in enumerate(wanted):
        name = f"{given.name}, teacher" if teacher else given.name
        name = f"{name} {number}" if name in found else name
        if not teacher and (given / "config.json").is_file():
            code = json.loads((given / "config.json").read_text(encoding="utf-8")).get("auto_map")
            if code and not arguments.trust_remote_code:
                raise ConfigError(
                    f"{given} brings Python code of its own; read it and give --trust-remote-code"
                )
            found[name] = (given, arguments.trust_remote_code)
            continue
        found[name] = (scratch / str(number), True)
        export_run(given, found[name][0], teacher=teacher)
    return found


def load(path: Path, trust: bool) -> tuple[Any, Any]:
    """Model and processor of a local directory, fp32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = dict(trust_remote_code=trust, local_files_only=True)
    with _told_of(path):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32", **options)
        return model.eval(), AutoProcessor.from_pretrained(path, **options)


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """What transformers says of a directory that it cannot load, as one line that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"{path} cannot be loaded by transformers ({why})") from None


def reconstruct(folder: str, images: Sequence[Any]) -> Any:
    """What the run in `folder` makes of tokens of `images`, masked as at its last iteration."""
    import numpy as np

    from laver_mcore.data.records.sample import Turn
    from laver_mcore.diagnose.reconstruction import Reconstruction, last_masks, latents, nearest
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import (
        build_image_processor,
        build_network,
        build_tokenizer,
        resolve_vocab_size,
    )
    from laver_mcore.train.saved_weights import load_teacher
    from laver_mcore.validation.answers import Reader

    config = resolve(replace(from_recipe(Path(folder) / "config.yaml"), parallel=ParallelConfig()))
    if not (config.objective.reconstructs and config.objective.teacher(config)):
        raise ConfigError(f"{folder} has no teacher: its objective is {config.objective.name}")
    tokenizer = build_tokenizer(config)
    reader = Reader(tokenizer=tokenizer, processor=build_image_processor(config))
    asked, keys = [Turn("user", "<image>")] * len(images), [str(number) for number in range(len(images))]
    batch = reader.batch(asked, images, keys=keys, system_prompt=config.data.system_prompt)
    device = parallel.init_distributed()
    try:
        vocab_size = resolve_vocab_size(config, tokenizer)
        network = build_network(config, parallel.build_topology(config.parallel, device), vocab_size, folder)
        masked_N = last_masks(network, batch)
        student_NK = latents(network, batch, masked_N)
        load_teacher(network.chunks, config, vocab_size, folder)
        teacher_NK = latents(network, batch, np.zeros_like(masked_N))
    finally:
        parallel.forget_groups()
    found = nearest(student_NK, teacher_NK)
    return Reconstruction(images=images, grids=batch.image_grids, masked_N=masked_N, nearest_N=found)


def diagnose(arguments: argparse.Namespace, scratch: Path) -> None:
    """Read all models and write everything."""
    from laver_mcore.diagnose import pictures, reading
    from laver_mcore.diagnose.encoder import Encoder, alignments
    from laver_mcore.diagnose.page import page

    if arguments.encoder and not (Path(arguments.encoder) / "config.json").is_file():
        raise ConfigError(
            f"--encoder {arguments.encoder} has no config.json; give a directory of transformers"
        )
    asked = questions(arguments)
    with _told_of(Path(arguments.encoder or "")):
        encoder = Encoder(arguments.encoder) if arguments.encoder else None
    layers, accuracy, readings = {}, {}, {}
    for name, (path, trust) in directories(arguments, scratch).items():
        model, processor = load(path, trust)
        readings[name] = [reading.read(model, processor, question) for question in asked]
        layers[name] = reading.table(readings[name])
        if encoder:
            for row, value in zip(layers[name], alignments(encoder, asked, readings[name]), strict=True):
                row["cknna"] = value
        if "accuracy" not in arguments.skip:
            accuracy[name] = reading.accuracies(model, processor, asked, [r.grid for r in readings[name]])
    firsts = {name: found[0] for name, found in readings.items()}
    found = [reconstruct(run, [question.image for question in asked]) for run in arguments.teacher_of]
    drawn = [
        (
            "attention",
            "Attention of the answer's first token",
            pictures.attention_maps(asked[0].image, firsts),
        ),
        ("gram", "Gram matrices of the last layer", pictures.gram_matrices(firsts)),
        *(
            (f"masked{number or ''}", f"{Path(run).name}: {each.sentence}", pictures.reconstructions(each))
            for number, (run, each) in enumerate(zip(arguments.teacher_of, found, strict=True))
        ),
    ]
    if "states" not in arguments.skip:
        states = pictures.scatter({name: read[:8] for name, read in readings.items()})
        drawn.append(("states", "States of the last layer", states))
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for file, _, png in drawn:
        (output / f"{file}.png").write_bytes(png)
    numbers = {
        "layers": layers,
        "accuracy": accuracy,
        "masked": {run: each.sentence for run, each in zip(arguments.teacher_of, found, strict=True)},
    }
    (output / "diagnosis.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    rows = [{"model": name, **row} for name, found in layers.items() for row in found]
    with (output / "layers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    (output / "index.html").write_text(
        page(layers, accuracy, {title: png for _, title, png in drawn}), encoding="utf-8"
    )
    print(f"{output / 'index.html'}: {len(asked)} questions, {len(layers)} models")


def main(argv: list[str]) -> int:
    """Command line; returns the exit status, 2 for bad input."""
    from laver_mcore.data.errors import DataError

    arguments = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            diagnose(arguments, Path(scratch))
    except (ConfigError, DataError) as error:
        return refuse(error)
    return 0
