"""Compare our decoder with transformers' under the layouts of one world size: `parity_worker.py DIR`.

DIR/MODEL.pt holds a Qwen2 configuration, its weights, documents, and transformers' logits and gradients.
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


def model_config(hf):
    from laver_mcore.config.presets import fill_from_preset
    from laver_mcore.config.schema import ModelConfig

    return fill_from_preset(
        ModelConfig(
            model="tiny",
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=hf["num_attention_heads"],
            num_query_groups=hf["num_key_value_heads"],
            vocab_size=hf["vocab_size"],
            untie_embeddings_and_output_weights=not hf["tie_word_embeddings"],
            rotary_base=hf["rope_parameters"]["rope_theta"],
            norm_epsilon=hf["rms_norm_eps"],
            make_vocab_size_divisible_by=8,
        )
    )


def check_layout(case, parallel_flags, device):
    """Largest differences of logits (and of the relative gradient norm at TP 1) from transformers'."""
    import torch

    from laver_mcore.config.schema import Config, DataConfig, ParallelConfig, VisionConfig
    from laver_mcore.convert.probe import probe, text_batch
    from laver_mcore.convert.weights import load_hf_weights
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import attention_geometry, build_chunks

    config = Config(
        model=model_config(case["config"]),
        vision=VisionConfig(vision="none"),
        data=DataConfig(seq_length=ROWS),
        parallel=ParallelConfig(**parallel_flags),
    )
    topology = parallel.build_topology(config.parallel, device)
    vocab_size = case["config"]["vocab_size"]
    chunks = build_chunks(config, topology, vocab_size)
    fresh = load_hf_weights(chunks, config.model, vocab_size, topology, case["weights"])
    assert not fresh, fresh
    batch = text_batch(case["documents"], ROWS)
    seen = probe(chunks, batch, attention_geometry(config), topology, vocab_size)
    wanted_TV = torch.cat(case["logits"])
    result = {
        "logits": float((seen.logits_TV[: len(wanted_TV)] - wanted_TV).abs().max()),
        "layers": [
            float((seen.layers[i][: len(wanted_TV)] - torch.cat(hidden)).abs().max())
            for i, hidden in enumerate(case["layers"])
        ],
        "scale": float(wanted_TV.abs().max()),
    }
    if topology.world_size == 1:
        result["gradients"] = gradients(case, chunks, batch, config, topology, vocab_size)
    return result


def gradients(case, chunks, batch, config, topology, vocab_size):
    """Relative difference of every parameter's gradient."""
    import torch.nn.functional as F

    from laver_mcore.convert.names import entries, fuse, pad_vocabulary
    from laver_mcore.convert.probe import gather_logits
    from laver_mcore.model.inputs import model_inputs
    from laver_mcore.model.parameters import named_parameters
    from laver_mcore.train.build import attention_geometry

    inputs = model_inputs(
        batch, ROWS, geometry=attention_geometry(config), num_shares=1, device=topology.device
    )
    logits_TV = gather_logits(chunks[0](inputs), topology, vocab_size)
    F.cross_entropy(logits_TV, batch.labels_T, ignore_index=-100).backward()
    table = {entry.ours: entry for entry in entries(config.model)}
    differences = {}
    for item in named_parameters(chunks, topology):
        entry = table[item.name]
        wanted = fuse(entry, [case["gradients"][name] for name in entry.theirs], config.model)
        if entry.fusion == "vocabulary":
            wanted = pad_vocabulary(wanted, item.parameter.shape[0])
        error = (item.parameter.grad - wanted).norm() / wanted.norm()
        differences[item.name] = float(error)
    return differences


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
            if case["config"]["num_hidden_layers"] % (4 if name == "pp2_vp2" else 1) == 0:
                results[f"{path.stem}-{name}"] = check_layout(case, flags, device)
    if dist.get_rank() == 0:
        (directory / f"results_{world}.json").write_text(json.dumps(results))
    parallel.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
