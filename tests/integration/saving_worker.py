"""What saving and loading hold in the memory of each of four ranks: `saving_worker.py DIRECTORY FLAGS...`.

Every rank writes DIRECTORY/RANK.json: bytes of the state that it brings to a save and to a load, what all ranks
together hold of the optimizer and the teacher, and whether a second engine that loads holds the same afterwards.
"""

import json
import sys
import warnings
from pathlib import Path


def state_bytes(state) -> int:
    """Bytes of all tensors of the optimizer's and the teacher's part of a state."""
    from laver_mcore.megatron.optimizer_state import sharded_parameters

    found = [state.get("teacher", {}), state["optimizer"]["param_state"]]
    return sum(sharded.data.nbytes for part in found for sharded in sharded_parameters(part))


def shards_of(engine) -> list:
    """Every piece of a master, a moment and an average that this rank keeps."""
    from laver_mcore.megatron.optimizer import distributed_parts

    (part,) = distributed_parts(engine.optimizer)
    masters = [p for group in part.optimizer.param_groups for p in group["params"]]
    moments = [part.optimizer.state[p][name] for p in masters for name in ("exp_avg", "exp_avg_sq", "step")]
    weights = [p.detach() for chunk in engine.chunks for p in chunk.parameters()]
    copies = list(engine.teacher._compute.values())
    return [t.detach() for t in (*masters, *moments, *engine.teacher.averages.values(), *weights, *copies)]


def main(directory: str, *argv: str) -> None:
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from laver_mcore.cli.run import train_run
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train import checkpoint
    from laver_mcore.train.build import build_engine
    from laver_mcore.train.checkpoint import Progress

    device = parallel.init_distributed(timeout_minutes=2)
    config, _ = parse([*argv])
    engine = train_run(config, device)
    held = [t.nbytes for t in shards_of(engine)]
    seen = []
    save, load = checkpoint.Write, checkpoint.dist_checkpointing.load

    def saves(state, *rest):
        seen.append(state_bytes(state))
        return save(state, *rest)

    def loads(state, *rest):
        seen.append(state_bytes(state))
        return load(state, *rest)

    checkpoint.Write, checkpoint.dist_checkpointing.load = saves, loads
    checkpoint.save(engine, Path(directory) / "run", Progress(iteration=1), "data")
    other, _ = build_engine(config, engine.topology, engine.vocab_size)
    with torch.no_grad():
        for tensor in (*other.chunks[0].parameters(), *other.teacher.averages.values()):
            tensor.fill_(0.5)
    checkpoint.load(other, Path(directory) / "run", "data")
    pairs = list(zip(shards_of(engine), shards_of(other), strict=True))
    found = {
        "saving": seen[0],
        "loading": seen[1],
        "different": sum(not torch.equal(a, b) for a, b in pairs),
        "compared": len(pairs),
        "largest": 4 * 4 * max(p.numel() for chunk in engine.chunks for p in chunk.parameters()),
        "held": sum(held),
        "whole": 4 * 4 * sum(p.numel() for chunk in engine.chunks for p in chunk.parameters()),
    }
    (Path(directory) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    parallel.shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
