"""Compare our decoder with transformers' under the layouts of one world size: `parity_worker.py DIR`.

DIR/MODEL is a Hugging Face directory; DIR/MODEL.pt holds documents, and transformers' logits and gradients on them.
"""

import json
import sys
import warnings
from pathlib import Path

LAYOUTS = {
    1: {"tp1": {}},
    2: {
        "tp2": dict(tensor_model_parallel_size=2),
        "tp2_sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
        "pp2": dict(pipeline_model_parallel_size=2),
        "pp2_vp2": dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
    },
}
ROWS = 40


def check_layout(directory, case, parallel_flags, device):
    """Largest differences of logits, and of each gradient relative to its norm, from transformers'."""
    import torch

    from laver_mcore.config.load import resolve
    from laver_mcore.config.schema import (
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RunConfig,
        TrainConfig,
        VisionConfig,
    )
    from laver_mcore.convert.probe import probe, text_batch
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import build_engine
    from laver_mcore.train.step import train_step

    config = resolve(
        Config(
            model=ModelConfig(make_vocab_size_divisible_by=8),
            vision=VisionConfig(vision="none"),
            data=DataConfig(data_path=("none",), tokenizer_model="none", seq_length=ROWS, pad_to_multiple=4),
            parallel=ParallelConfig(**parallel_flags),
            optimizer=OptimizerConfig(clip_grad=0.0),
            train=TrainConfig(
                global_batch_size=2 if "num_virtual_stages_per_pipeline_rank" in parallel_flags else 1
            ),
            run=RunConfig(hf_path=str(directory)),
        )
    )
    topology = parallel.build_topology(config.parallel, device)
    vocab_size = config.model.vocab_size
    engine, _ = build_engine(config, topology, vocab_size)
    batch = text_batch(case["documents"], ROWS)
    seen = probe(engine.chunks, batch, engine.geometry, topology, vocab_size)
    wanted_TV = torch.cat(case["logits"])
    # The interleaved schedule wants two micro-batches: the same one twice has the same mean.
    train_step(engine, [batch] * config.train.global_batch_size, 0)
    return {
        "logits": float((seen.logits_TV[: len(wanted_TV)] - wanted_TV).abs().max()),
        "layers": [
            float((seen.layers[i][: len(wanted_TV)] - torch.cat(hidden)).abs().max())
            for i, hidden in enumerate(case["layers"])
        ],
        "scale": float(wanted_TV.abs().max()),
        "gradients": gradients(case, engine, config, topology),
    }


def gradients(case, engine, config, topology):
    """Relative difference of every parameter's gradient, the largest of all ranks' shards of it."""
    import torch
    import torch.distributed as dist

    from laver_mcore.convert.names import entries, fuse, pad_vocabulary
    from laver_mcore.model.parameters import named_parameters
    from laver_mcore.model.sharding import shard

    table = {entry.ours: entry for entry in entries(config.model)}
    mine = {}
    for item in named_parameters(engine.chunks, topology):
        entry = table[item.name]
        wanted = fuse(entry, [case["gradients"][name] for name in entry.theirs], config.model)
        if entry.fusion == "vocabulary":
            wanted = pad_vocabulary(wanted, item.parameter.shape[0] * topology.tp_size)
        norm = wanted.norm()
        if item.sharded:
            wanted = shard(
                wanted, item.name, item.parameter.partition_dim, topology.tp_rank, topology.tp_size
            )
        mine[item.name] = float(torch.linalg.vector_norm(item.parameter.main_grad - wanted) / norm)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {name: max(part.get(name, 0.0) for part in gathered) for part in gathered for name in part}


def main(directory):
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    from laver_mcore.megatron import parallel

    device = parallel.init_distributed(timeout_minutes=2)
    world = dist.get_world_size()
    results = {}
    for path in sorted(directory.glob("*.pt")):
        case = torch.load(path, weights_only=True)
        for name, flags in LAYOUTS[world].items():
            if len(case["layers"]) % (4 if name == "pp2_vp2" else 1) == 0:
                folder = directory / path.stem
                results[f"{path.stem}-{name}"] = check_layout(folder, case, flags, device)
    if dist.get_rank() == 0:
        (directory / f"results_{world}.json").write_text(json.dumps(results))
    parallel.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
