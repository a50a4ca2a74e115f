"""Answer the questions of a LLaVA JSON file with a trained run.

    torchrun tools/evaluate.py --checkpoint DIR --data FILE --output ANSWERS.jsonl

Each question of a dialogue is answered by itself after the right answers to the ones before it. Writes one JSON line
per question: key, image, question, expected, answer.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from laver_mcore.config.checks import ConfigError
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.config.schema import Config, ParallelConfig
from laver_mcore.console import refuse, silence_megatron


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Greedy answers of a trained run to every question of a data file."""

    checkpoint: str
    """Folder of a run: its config.yaml and newest checkpoint are used."""
    data: str
    """LLaVA / ShareGPT JSON or JSONL with the questions and the right answers."""
    output: str
    """JSON lines file to write."""
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


def evaluate(arguments: Arguments, config: Config) -> None:
    """Answer all questions and write them on the last rank."""
    from PIL import Image
    from tqdm import tqdm

    from laver_mcore import parallel
    from laver_mcore.build import build_image_processor, build_network, build_tokenizer, resolve_vocab_size
    from laver_mcore.data.decode import open_image
    from laver_mcore.data.prompt import encode_prompt
    from laver_mcore.data.records import load_records
    from laver_mcore.generate import generate

    samples = load_records(arguments.data, arguments.image_folder or Path(arguments.data).parent)
    tokenizer, processor = build_tokenizer(config), build_image_processor(config)
    device = parallel.init_distributed()
    topology = parallel.build_topology(config.parallel, device)
    network = build_network(config, topology, resolve_vocab_size(config, tokenizer), arguments.checkpoint)
    questions = [
        (sample, index)
        for sample in samples
        for index, turn in enumerate(sample.turns)
        if turn.role == "assistant"
    ]
    rows = []
    for start in tqdm(
        range(0, len(questions), arguments.batch_size), disable=not topology.is_last_rank, unit="batch"
    ):
        part = questions[start : start + arguments.batch_size]
        prompts, images = [], []
        for sample, index in part:
            opened: list[Image.Image] = [open_image(path) for path in sample.images]
            grids = [processor.grid(*image.size) for image in opened] if processor else []
            turns = sample.turns[:index]
            prompts.append(encode_prompt(turns, grids, tokenizer, system_prompt=config.data.system_prompt))
            images.extend(opened)
        answers = generate(
            network,
            prompts,
            images,
            processor,
            stop_token=tokenizer.special.im_end,
            max_new_tokens=arguments.max_new_tokens,
        )
        for (sample, index), ids in zip(part, answers, strict=True):
            rows.append(
                {
                    "key": sample.key,
                    "image": str(sample.images[0]) if sample.images else None,
                    "question": sample.turns[index - 1].text.replace("<image>", "").strip(),
                    "expected": sample.turns[index].text.strip(),
                    "answer": tokenizer.decode(ids).strip(),
                }
            )
    if topology.is_last_rank:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parallel.shut_down()


def main() -> int:
    """Command line; returns the exit status, 2 for bad input."""
    from laver_mcore.data.errors import DataError

    silence_megatron()
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        config = from_recipe(Path(arguments.checkpoint) / "config.yaml")
        layout = ParallelConfig(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        )
        evaluate(arguments, resolve(replace(config, parallel=layout)))
    except (ConfigError, DataError) as error:
        return refuse("evaluate.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
