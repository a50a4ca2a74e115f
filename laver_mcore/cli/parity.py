"""Compare the engine with transformers on the same weights: `laver parity --hf-path DIR [--load DIR]`.

DIR is a text model's directory (text batches), or an export of `laver export` (image-text batches too; --load is
then the run it came from). Without --load the engine reads the weights from that directory itself.
Prints the largest difference per batch and the first divergent layer; exit status 1 past --tolerance, 2 for
bad input.

    laver parity --hf-path Qwen2.5-0.5B --tensor-model-parallel-size 2 --report parity.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser, file_to_write


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__)
    parser.add_argument("--hf-path", required=True, help="what transformers loads")
    parser.add_argument("--load", help="folder of the run, or converted checkpoint, that the engine loads")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="on logits, in units of the largest, and on the loss; fp32",
    )
    parser.add_argument(
        "--report", type=file_to_write, help="also write the whole table to this Markdown file"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code inside an exported model"
    )
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Compare on as many ranks as the layout has, print what rank 0 found. Returns the exit status."""
    args = parse(argv)
    if args.result:
        found = attempt(args)
        if os.environ["RANK"] == "0":
            Path(args.result).write_text(json.dumps(found))
        return 0
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    found = attempt(args) if ranks == 1 else launch(argv, ranks)
    if "error" in found:
        return refuse(found["error"])
    if args.report:
        args.report.write_text(found["report"], encoding="utf-8")
    print("\n".join(found["lines"]))
    return 0 if found["passes"] else 1


def launch(argv: list[str], ranks: int) -> dict:
    """Run this program again in `ranks` processes; rank 0 leaves its findings in a file."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        command += ["-m", "laver_mcore", "parity", *argv, "--result", str(result)]
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not result.is_file():
            return {"error": f"the ranks failed:\n{done.stdout}{done.stderr}"}
        return json.loads(result.read_text())


def attempt(args: argparse.Namespace) -> dict:
    """What `run` finds on this rank, or the one line that says why it cannot."""
    from laver_mcore.config.errors import ConfigError
    from laver_mcore.megatron import parallel

    try:
        return run(args)
    except (ConfigError, ValueError) as error:
        return {"error": " ".join(str(error).split())}
    finally:
        parallel.shut_down()


def run(args: argparse.Namespace) -> dict:
    """Build the engine on this rank, compare on rank 0."""
    from laver_mcore.convert.parity import compare, engine_probe, report
    from laver_mcore.convert.safetensors_directory import read_json
    from laver_mcore.megatron import parallel

    hf_config = read_json(Path(args.hf_path) / "config.json")
    is_laver = hf_config.get("model_type") == "laver"
    config = engine_config(args, is_laver)
    device = parallel.init_distributed()
    network = engine_network(args, config, device)
    model = load_reference(args, is_laver) if network.topology.rank == 0 else None
    comparisons = []
    for name, prompts, pixels in batches(network, hf_config if is_laver else None):
        seen, batch = engine_probe(network, prompts, pixels)
        if model is not None:
            comparisons.append(compare(name, seen, batch, model, prompts))
    lines = []
    for each in comparisons:
        first = each.first_divergent_layer(args.tolerance)
        where = "no layer diverges" if first is None else f"first divergent layer {first}"
        lines.append(
            f"{each.name}: largest difference {each.logits.difference:.3e} of {each.logits.magnitude:.3g}: "
            f"{each.logits.relative:.3e} (tolerance {args.tolerance:g}), "
            f"loss {each.engine_loss:.6f} and {each.reference_loss:.6f}, {where}"
        )
    text = report(comparisons, args.tolerance, facts(args))
    return {"lines": lines, "report": text, "passes": all(c.passes(args.tolerance) for c in comparisons)}


def engine_config(args: argparse.Namespace, is_laver: bool):
    """The recipe of the run, or one for the text model's directory, under the layout asked for, in fp32."""
    from dataclasses import replace

    from laver_mcore.config.hugging_face import read_shape
    from laver_mcore.config.presets import fill_from_preset
    from laver_mcore.config.schema import Config, ModelConfig, ParallelConfig, VisionConfig
    from laver_mcore.convert.decoder import open_run
    from laver_mcore.convert.errors import ConversionError

    if is_laver and not args.load:
        raise ConversionError(f"{args.hf_path} is an exported run; give the run itself with --load")
    if args.load:
        config, _ = open_run(args.load)
    else:
        model = fill_from_preset(ModelConfig(), read_shape(args.hf_path))
        config = Config(model=model, vision=VisionConfig(vision="none"))
    layout = ParallelConfig(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )
    # Also where the recipe demands Transformer Engine's layers: those multiply fp32 in TF32.
    train = replace(config.train, bf16=False, transformer_impl="local")
    return replace(config, parallel=layout, train=train)


def engine_network(args: argparse.Namespace, config, device):
    """The engine's model on this rank, with the weights of --load or of the text model's directory."""
    from laver_mcore.convert.decoder import check_weights, open_run
    from laver_mcore.convert.safetensors_directory import open_weights
    from laver_mcore.convert.weights import load_hf_weights
    from laver_mcore.megatron import parallel
    from laver_mcore.model.network import Network
    from laver_mcore.train.build import attention_geometry, build_chunks, build_network

    topology = parallel.build_topology(config.parallel, device)
    if args.load:
        vocab_size = open_run(args.load)[1].common["identity"]["vocab_size"]
        return build_network(config, topology, vocab_size, args.load)
    vocab_size = config.model.vocab_size
    weights = open_weights(args.hf_path)
    check_weights(weights, config.model, vocab_size, args.hf_path)
    chunks = build_chunks(config, topology, vocab_size)
    load_hf_weights(chunks, config.model, vocab_size, topology, weights)
    geometry = attention_geometry(config)
    return Network(
        config=config, topology=topology, models=list(chunks), geometry=geometry, vocab_size=vocab_size
    )


def load_reference(args: argparse.Namespace, is_laver: bool):
    """transformers' model in fp32, on CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from laver_mcore.convert.errors import ConversionError

    if is_laver and not args.trust_remote_code:
        raise ConversionError(
            f"{args.hf_path} brings its own modeling_laver.py; read it and give --trust-remote-code"
        )
    model = AutoModelForCausalLM.from_pretrained(
        args.hf_path, dtype=torch.float32, trust_remote_code=args.trust_remote_code, local_files_only=True
    )
    return model.eval()


def batches(network, hf_config: dict | None):
    """(name, prompts, this rank's pixels): text, one image, two images; the last two for exported models
    alone.
    """
    import torch
    from PIL import Image

    from laver_mcore.convert.parity import image_prompt, text_prompts
    from laver_mcore.data.order.balance import image_shares
    from laver_mcore.train.build import build_image_processor

    topology, vocab_size = network.topology, network.vocab_size
    processor = build_image_processor(network.config)
    none = processor([]) if processor is not None and topology.on_first_stage else None
    yield "text", text_prompts(vocab_size, (37, 11)), none
    if hf_config is None or processor is None:
        return
    generator = torch.Generator().manual_seed(0)
    for name, counts in (("one image", (1,)), ("two images", (2, 1))):
        prompts, images, all_grids = [], [], []
        for seed, count in enumerate(counts):
            noise = torch.randint(0, 256, (count, 50, 70, 3), generator=generator, dtype=torch.uint8)
            own = [Image.fromarray(each.numpy()) for each in noise]
            grids = [processor.grid(*image.size) for image in own]
            prompts.append(image_prompt(vocab_size, hf_config["image_token_id"], grids, processor(own), seed))
            images += own
            all_grids += grids
        start, stop = image_shares(all_grids, topology.tp_size)[topology.tp_rank]
        yield name, prompts, processor(images[start:stop]) if topology.on_first_stage else None


def facts(args: argparse.Namespace) -> dict[str, object]:
    """What an issue should say about the environment."""
    import megatron.core
    import torch
    import transformers

    return {
        "hf_path": args.hf_path,
        "load": args.load or "the same",
        "layout": f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size}"
        + (" + SP" if args.sequence_parallel else ""),
        "engine device": "cuda" if torch.cuda.is_available() else "cpu",
        "precision": "fp32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "megatron-core": megatron.core.__version__,
    }
