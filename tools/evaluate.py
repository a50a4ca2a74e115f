"""Answer the questions of a LLaVA JSON file with a trained run.

    torchrun tools/evaluate.py --checkpoint DIR --data FILE

Each question of a dialogue is answered by itself after the right answers to the ones before it. Writes one JSON line
per question: key, image, question, expected, answer. A question with a broken picture has `error` and an empty answer;
where no question can be answered the exit status is 2.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from laver_mcore.cli.console import refuse, silence_megatron
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.config.schema import Config, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Greedy answers of a trained run to every question of a data file."""

    checkpoint: tuple[str, ...]
    """Folders of runs of one model shape: each one's config.yaml and newest checkpoint are used."""
    data: str
    """LLaVA / ShareGPT JSON or JSONL with the questions and the right answers."""
    output: str = "answers.jsonl"
    """Name of the JSON lines file to write into each run's folder, or a path of its own for a single run."""
    image_folder: str | None = None
    """Folder of the images; the data file's own folder where not given."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers."""
    batch_size: int = 64
    """Questions answered together."""
    max_new_tokens: int = 32
    """Longest answer."""


def evaluate(arguments: Arguments, configs: list[Config]) -> None:
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
    from laver_mcore.validation.answers import Reader, answer, questions_of

    folder_of_images = arguments.image_folder or Path(arguments.data).parent
    # A picture that is gone costs its own answer, when it is looked at.
    samples = load_records(arguments.data, folder_of_images, check_files=False)
    device = parallel.init_distributed()
    for folder, config in zip(arguments.checkpoint, configs, strict=True):
        tokenizer, processor = build_tokenizer(config), build_image_processor(config)
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
    parallel.shut_down()


def main() -> int:
    """Command line; returns the exit status, 2 for bad input."""
    from laver_mcore.data.errors import DataError

    silence_megatron()
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"{name}={getattr(arguments, name)} is not at least 1")
        layout = ParallelConfig(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        )
        recipes = [from_recipe(Path(folder) / "config.yaml") for folder in arguments.checkpoint]
        evaluate(arguments, [resolve(replace(config, parallel=layout)) for config in recipes])
    except (ConfigError, DataError) as error:
        return refuse("evaluate.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
