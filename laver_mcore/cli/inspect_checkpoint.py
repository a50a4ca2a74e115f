"""What a run's checkpoints hold and whether they are whole: `laver inspect DIR`.

DIR is a run's folder, or one `iter_0000100`. Nothing in a checkpoint is run. Exit status 1 where one is damaged.
"""

import argparse
from pathlib import Path

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = FlagParser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--no-verify", action="store_true", help="look at names and sizes, compute no checksum"
    )
    return parser.parse_args(argv)


def describe(folder: Path, *, tensors: bool) -> list[str]:
    """Lines about a checkpoint that is whole; `ConfigError` for one that cannot be read all the same."""
    import torch

    from laver_mcore.convert.distributed_checkpoint import CheckpointReader
    from laver_mcore.megatron.checkpoints import CheckpointError

    reader = CheckpointReader(folder)
    if not isinstance(reader.common, dict):
        raise CheckpointError(f"{folder}: common.pt is no dictionary")
    names = sorted(reader)
    parts: dict[str, tuple[int, int]] = {}
    for name in names:
        numel = torch.Size(reader.shape(name)).numel()
        part = name.split(".")[0]
        count, size = parts.get(part, (0, 0))
        parts[part] = count + 1, size + numel * reader.dtype(name).itemsize
    lines = [
        f"  {part:<24}{count:>8,} tensors{size / 2**20:>12,.1f} MiB" for part, (count, size) in parts.items()
    ]
    for name in ("progress", "layout", "identity"):
        if name in reader.common:
            lines.append(f"  {name}: {reader.common[name]}")
    if tensors:
        lines += [f"  {name} {list(reader.shape(name))} {reader.dtype(name)}" for name in names]
    return lines


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 1 for a damaged checkpoint, 2 for a folder without any."""
    args = parse(argv)
    from laver_mcore.config.errors import ConfigError
    from laver_mcore.megatron.checkpoints import checkpoint_folder
    from laver_mcore.megatron.intact import first_fault, saved_iterations, tracked_iteration

    directory = args.directory
    folders = [checkpoint_folder(directory, iteration) for iteration in saved_iterations(directory)]
    if directory.name.startswith("iter_"):
        folders = [directory]
    if not folders:
        return refuse(f"{directory} holds no checkpoint")
    if folders != [directory]:
        tracked = tracked_iteration(directory)
        print(
            f"{directory}: {len(folders)} checkpoints, {'none tracked' if tracked is None else f'{tracked} tracked'}"
        )
    status = 0
    for folder in folders:
        fault = first_fault(folder, verify=not args.no_verify)
        lines: list[str] = []
        if fault is None:
            try:
                lines = describe(folder, tensors=args.tensors)
            except ConfigError as error:
                fault = str(error)
        status = status if fault is None else 1
        print(f"{folder.name}: {'whole' if fault is None else f'DAMAGED ({fault})'}")
        print("".join(f"{line}\n" for line in lines), end="")
    return status
