"""Answer the questions of a LLaVA JSON file with a trained run.

    laver answer --checkpoint DIR --data FILE
    torchrun --nproc-per-node 2 -m laver_mcore answer --checkpoint DIR --data FILE --tensor-model-parallel-size 2

Each question of a dialogue is answered by itself after the right answers to the ones before it. Writes one JSON line
per question: key, image, question, expected, answer. A question with a broken picture has `error` and an empty answer;
where no question can be answered the exit status is 2.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from laver_mcore.cli.console import refuse
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.config.schema import Config, ParallelConfig


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="RUN",
        help="folders of runs of one model shape: each one's config.yaml and newest checkpoint are used",
    )
    add(
        "--data",
        required=True,
        help="LLaVA / ShareGPT JSON or JSONL with the questions and the right answers",
    )
    add(
        "--output",
        default="answers.jsonl",
        help="JSON lines file to write into each run's folder, or a path of its own for a single run",
    )
    add("--image-folder", help="folder of the images; the data file's own folder where not given")
    add("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer's matrices")
    add("--pipeline-model-parallel-size", type=int, default=1, help="ranks that share the stack of layers")
    add("--batch-size", type=int, default=64, help="questions answered together")
    add("--max-new-tokens", type=int, default=32, help="longest answer")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"{name}={getattr(args, name)} is not at least 1")
    return args


def evaluate(arguments: argparse.Namespace, configs: list[Config]) -> None:
    """Answer all questions with every run and write them on the last rank."""
    from laver_mcore.data.errors import DataError
    from laver_mcore.data.records.conversation import load_records
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import (
        build_image_processor,
        build_network,
        build_tokenizer,
        resolve_vocab_size,
    )
    from laver_mcore.train.saved_weights import check_trained_with
    from laver_mcore.validation.answers import Reader, answer, questions_of

    folder_of_images = arguments.image_folder or Path(arguments.data).parent
    # A picture that is gone costs its own answer, when it is looked at.
    samples = load_records(arguments.data, folder_of_images, check_files=False)
    device = parallel.init_distributed()
    for folder, config in zip(arguments.checkpoint, configs, strict=True):
        tokenizer, processor = build_tokenizer(config), build_image_processor(config)
        check_trained_with(folder, config, tokenizer)
        topology = parallel.build_topology(config.parallel, device)
        network = build_network(config, topology, resolve_vocab_size(config, tokenizer), folder)
        reader = Reader(
            tokenizer=tokenizer,
            processor=processor,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
        )
        rows = answer(questions_of(samples), network, reader, speaks=topology.is_last_rank)
        broken = [row for row in rows if "error" in row]
        if len(broken) == len(rows):
            raise DataError(
                f"no question can be answered: {broken[0]['error'] if broken else 'there is none'}"
            )
        if broken and topology.is_last_rank:
            first = broken[0]["error"]
            print(f"{len(broken)} of {len(rows)} questions have a broken picture: {first}", file=sys.stderr)
        if topology.is_last_rank:
            single = len(configs) == 1 and Path(arguments.output).parent != Path(".")
            path = Path(arguments.output) if single else Path(folder) / arguments.output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            right = sum(row["answer"].strip() == row["expected"].strip() for row in rows)
            print(
                f"{path}: {len(rows):,} answers, {right:,} of them ({right / len(rows):.1%}) word for word as expected"
            )
    parallel.shut_down()


def main(argv: list[str]) -> int:
    """Command line; returns the exit status, 2 for bad input."""
    from laver_mcore.data.errors import DataError

    arguments = parse(argv)
    try:
        layout = ParallelConfig(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        )
        recipes = [from_recipe(Path(folder) / "config.yaml") for folder in arguments.checkpoint]
        evaluate(arguments, [resolve(replace(config, parallel=layout)) for config in recipes])
    except (ConfigError, DataError) as error:
        return refuse(error)
    return 0
