"""The `laver` command: one word for each thing that a person does, `laver train --config RECIPE`.

On several processes: `laver train --nproc-per-node 8 ...`, or behind torchrun, `torchrun ... -m laver_mcore train ...`.
"""

import functools
import importlib
import sys
from typing import NamedTuple, NoReturn

from laver_mcore.cli.console import refuse, run_and_leave, silence_libraries
from laver_mcore.cli.launch import LAUNCHED, launch, split


class Command(NamedTuple):
    """A module with `main(argv) -> exit status`, and what it does."""

    module: str
    about: str


COMMANDS = {
    "train": Command("laver_mcore.cli.train", "train a model from a recipe"),
    "plan": Command("laver_mcore.plan.__main__", "rank parallel layouts for a cluster, on paper"),
    "prepare": Command("laver_mcore.cli.prepare", "turn a published corpus into shards"),
    "prepare-targets": Command("laver_mcore.cli.targets", "compute a frozen encoder's features once"),
    "inspect": Command(
        "laver_mcore.cli.inspect_checkpoint", "what a run's checkpoints hold, and are they whole"
    ),
    "inspect-data": Command("laver_mcore.cli.inspect_data", "what a step of a run saw, as a page"),
    "convert": Command("laver_mcore.cli.convert", "Hugging Face directory -> checkpoint"),
    "export": Command("laver_mcore.cli.export", "checkpoint -> Hugging Face directory"),
    "parity": Command("laver_mcore.cli.parity", "compare the engine with transformers on the same weights"),
    "chat": Command("laver_mcore.cli.chat", "ask an exported model about images"),
    "answer": Command("laver_mcore.cli.answer", "answer a data file's questions with a run"),
    "eval": Command("laver_mcore.cli.evaluate", "an exported model on benchmarks, under lmms-eval"),
    "report": Command("laver_mcore.cli.report", "a run as a page: curves, time, samples with masks"),
    "diagnose": Command("laver_mcore.cli.diagnose", "what models do with pictures, side by side, as a page"),
}


def usage() -> str:
    """The list of commands."""
    rows = [f"  {name:<16}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: laver COMMAND ...", "", *rows, "", "laver COMMAND --help lists a command's flags."]
    )


def main(argv: list[str]) -> int:
    """Run the command that `argv` begins with; returns its exit status, 2 for a word that is none."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    sys.argv = ["laver", *argv]
    if name not in COMMANDS:
        return refuse(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"laver {name}", *rest]  # the name by which the command speaks of itself
    if name in LAUNCHED:
        flags, rest = split(rest)
        if flags.nproc_per_node is not None:
            return launch(name, flags, rest)
    return run(name, rest)


def run(name: str, argv: list[str]) -> int:
    """Run one command, whatever the program around it is called; returns its exit status."""
    silence_libraries()
    return importlib.import_module(COMMANDS[name].module).main(argv)


def laver() -> NoReturn:
    """The console script."""
    run_and_leave(main)


def script(name: str) -> NoReturn:
    """What a script of one command does."""
    run_and_leave(functools.partial(run, name))
