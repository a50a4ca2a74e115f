"""Convert a Qwen2.5 directory into a distributed checkpoint: `laver convert --hf-path DIR --save DIR`.

Runs on CPU in one process, without Transformer Engine, holding one block of a tensor in memory at a time. The
result loads under any parallel layout: `laver train --pretrained-checkpoint DIR`.
"""

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser, folder_to_write


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for input that cannot be converted."""
    parser = FlagParser(__doc__)
    parser.add_argument(
        "--hf-path",
        required=True,
        help="Hugging Face directory of a text model: Qwen2.5, Qwen3, Llama, Vicuna",
    )
    parser.add_argument("--save", type=folder_to_write, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="cast to this; default: as stored")
    parser.add_argument("--allow-pickle", action="store_true", help="accept pytorch_model.bin")
    args = parser.parse_args(argv)
    from laver_mcore.config.errors import ConfigError
    from laver_mcore.convert.decoder import DTYPES, import_decoder

    try:
        dtype = DTYPES[args.dtype] if args.dtype else None
        model = import_decoder(args.hf_path, args.save, dtype=dtype, allow_pickle=args.allow_pickle)
    except ConfigError as error:
        return refuse(error)
    print(f"{args.save}: {model.num_layers} layers of width {model.hidden_size}, {model.vocab_size:,} tokens")
    return 0
