"""Ask an exported model about images, in the terminal: `laver chat --model DIR --image FILE --prompt TEXT`.

The answer is streamed. --image may be given several times; without --prompt a conversation is read line by
line until an empty line or end of input. DIR is what `laver export` wrote, or any model of transformers with or
without images; code that a directory brings runs with --trust-remote-code alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from laver_mcore.cli.console import refuse
from laver_mcore.config.flags import FlagParser

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__)
    parser.add_argument("--model", required=True, help="exported directory")
    parser.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    parser.add_argument("--prompt", help="one question; default: a conversation from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of an exported model's directory",
    )
    args = parser.parse_args(argv)
    parser.want_at_least(1, args, "max_new_tokens")
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature {args.temperature} is no number from 0 on")
    return args


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for a model or image that cannot be read."""
    args = parse(argv)
    try:
        images = [open_image(path) for path in args.image]
        model, processor = load(args.model, args.device, trust=args.trust_remote_code)
        if images and not hasattr(processor, "tokenizer"):
            raise ValueError(f"{args.model} is a text model, which takes no --image")
    except (OSError, ValueError) as error:
        return refuse(str(error).splitlines()[0])
    messages: list[dict[str, Any]] = []
    while (question := ask(args.prompt, first=not messages)) is not None:
        if found := special_in(question, processor):
            return refuse(f"the question holds {found}, a special token; leave it out")
        messages.append(
            {"role": "user", "content": asked(question, len(images) if not messages else 0, processor)}
        )
        try:
            answer = stream(model, processor, messages, images, args)
        except (
            ValueError
        ) as error:  # a tokenizer without a template, pictures that a processor has no place for
            return refuse(str(error).splitlines()[0])
        messages.append({"role": "assistant", "content": answer})
    return 0


def asked(question: str, num_images: int, processor: Any) -> Any:
    """A question as the model's template takes it: parts for a processor, a string for the template of a text model."""
    if not hasattr(processor, "tokenizer"):
        return question
    return [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": question}]


def ask(prompt: str | None, *, first: bool) -> str | None:
    """The next question: the given one once, or lines from standard input; None at the end."""
    if prompt is not None:
        return prompt if first else None
    try:
        return input("> " if sys.stdin.isatty() else "").strip() or None
    except EOFError:
        return None


def special_in(question: str, processor: Any) -> str | None:
    """The first special token that a question spells out, which the model would take for structure; None without."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return next(
        (token for token in [*added, *tokenizer.all_special_tokens] if token and token in question), None
    )


def open_image(path: str) -> Any:
    """A decoded image."""
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)  # upright, as in training; the processors leave EXIF alone
    except Exception:  # whatever a damaged file, or one of 20,000 x 20,000 pixels, provokes
        raise ValueError(f"{path}: not an image that can be decoded") from None


def load(path: str, device: str, *, trust: bool) -> tuple[Any, Any]:
    """Model and processor of a local directory; its own code runs where that is trusted."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json; give a directory of Hugging Face, such as `laver export` writes"
        )
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    if not trust and "auto_map" in config:
        raise ValueError(f"{path} brings Python code of its own; read it and give --trust-remote-code")
    if not any(
        (Path(path) / name).is_file() for name in _TOKENIZERS
    ):  # transformers would make up an empty one
        raise ValueError(
            f"{path} has no tokenizer ({', '.join(_TOKENIZERS)}); put the model's own beside its weights"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sees = "vision_config" in config or "auto_map" in config
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype="auto", trust_remote_code=trust, local_files_only=True)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
    return model.to(device).eval(), processor


def stream(
    model: Any, processor: Any, messages: list[dict[str, Any]], images: list[Any], args: argparse.Namespace
) -> str:
    """Print the answer as it is generated and return it."""
    from transformers import TextStreamer

    tokenizer = getattr(processor, "tokenizer", processor)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if images:
        inputs = processor(text=text, images=images, return_tensors="pt").to(model.device, dtype=model.dtype)
    else:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    sampling = (
        dict(do_sample=True, temperature=args.temperature) if args.temperature > 0 else dict(do_sample=False)
    )
    generated = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
