"""Convert a Qwen2.5 directory into a distributed checkpoint: `hf_to_mcore.py --hf-path DIR --save DIR`.

Runs on CPU in one process, without Transformer Engine, holding one block of a tensor in memory at a time. The
result loads under any parallel layout: `pretrain_laver.py --pretrained-checkpoint DIR`.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for input that cannot be converted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf-path",
        required=True,
        help="Hugging Face directory of a text model: Qwen2.5, Qwen3, Llama, Vicuna",
    )
    parser.add_argument("--save", required=True, help="folder to create")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="cast to this; default: as stored")
    parser.add_argument("--allow-pickle", action="store_true", help="accept pytorch_model.bin")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    from laver_mcore.config.errors import ConfigError
    from laver_mcore.convert.decoder import DTYPES, import_decoder

    try:
        dtype = DTYPES[args.dtype] if args.dtype else None
        model = import_decoder(args.hf_path, args.save, dtype=dtype, allow_pickle=args.allow_pickle)
    except ConfigError as error:
        print(f"hf_to_mcore.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.save}: {model.num_layers} layers of width {model.hidden_size}, {model.vocab_size:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
