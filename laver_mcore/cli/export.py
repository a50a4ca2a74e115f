"""Write a run's newest checkpoint as a Hugging Face directory: `laver export --load DIR --save DIR`.

A run with a visual path becomes a whole image-text model (remote code, processor, chat template); one
without, a Qwen2 text model; `--decoder-only` takes the text model out of either. Runs on CPU in one process,
a block of a tensor at a time.
"""

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser, folder_to_write


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for input that cannot be converted."""
    parser = FlagParser(__doc__)
    parser.add_argument("--load", required=True, help="folder of a run, or of a converted checkpoint")
    parser.add_argument("--save", type=folder_to_write, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="cast to this; default: as stored")
    parser.add_argument("--teacher", action="store_true", help="the EMA weights instead of the student's")
    parser.add_argument("--adapter", action="store_true", help="LoRA's adapters alone, as a peft directory")
    parser.add_argument(
        "--form",
        choices=("laver", "llava"),
        default="laver",
        help="architecture of a model with images: its own code, or LLaVA's, which vLLM, SGLang and llama.cpp have",
    )
    parser.add_argument("--decoder-only", action="store_true", help="the text model alone")
    parser.add_argument(
        "--tokenizer", help="directory of the tokenizer to put beside; default: the run's own"
    )
    args = parser.parse_args(argv)
    from laver_mcore.config.errors import ConfigError
    from laver_mcore.convert.decoder import DTYPES
    from laver_mcore.convert.export import export_run
    from laver_mcore.convert.llava import SERVERS
    from laver_mcore.data.errors import DataError

    try:
        differs = export_run(
            args.load,
            args.save,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            teacher=args.teacher,
            decoder_only=args.decoder_only,
            tokenizer=args.tokenizer,
            adapter=args.adapter,
            form=args.form,
        )
    except (ConfigError, DataError) as error:
        return refuse(error)
    print(f"{args.save}: written from {args.load}")
    if differs:
        print(f"transformers alone loads it: {SERVERS} have no {'; no '.join(differs)}")
    return 0
