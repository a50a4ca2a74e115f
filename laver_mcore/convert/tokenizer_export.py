"""A run's tokenizer and prompt format as files that transformers loads: tokenizer.json,
chat_template.jinja.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from laver_mcore.convert.decoder import COMPANIONS
from laver_mcore.convert.errors import ConversionError
from laver_mcore.data.sequence.tokenizer import CHAT_TOKENS, Tokenizer, load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece's piece types
_SPACE = "\u2581"
_PROBES = (
    "What digit is in row 2, column 3?",
    "user\nRead it out.",
    "a  b\n c",
    "Größe 7, 東京 <|im_end|x",
    "0123456789",
)

# The training prompt (data/prompt.py): every image is followed by a line break.
_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and SYSTEM %}<|im_start|>system
{{ SYSTEM }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat_template(system_prompt: str) -> str:
    """Jinja template that writes conversations as training does, with the recipe's default system prompt."""
    return "{%- set SYSTEM = " + json.dumps(system_prompt) + " %}" + _TEMPLATE


def export_tokenizer(source: str | Path, destination: Path, system_prompt: str) -> Tokenizer:
    """Write tokenizer and chat template into `destination`; returns the tokenizer that the engine itself
    uses.
    """
    tokenizer = load_tokenizer(source)
    if Path(source).is_dir():
        for name in COMPANIONS:
            if (Path(source) / name).is_file() and not name.startswith(("generation", "chat_template")):
                shutil.copyfile(Path(source) / name, destination / name)
    else:
        _export_sentencepiece(Path(source), destination, tokenizer)
    (destination / "chat_template.jinja").write_text(chat_template(system_prompt), encoding="utf-8")
    return tokenizer


def _export_sentencepiece(source: Path, destination: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = fast_tokenizer(source)
    names = {token: text for text, token in backend.get_vocab().items()}
    special = tokenizer.special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=names[special.im_end],
        pad_token=names[special.pad],
        padding_side="left",
        additional_special_tokens=list(CHAT_TOKENS.values()),
        clean_up_tokenization_spaces=False,
    )
    for probe in _PROBES:
        found = fast.encode(probe, add_special_tokens=False, split_special_tokens=True)
        if found != tokenizer.encode(probe):
            raise ConversionError(
                f"{source}: {probe!r} is {tokenizer.encode(probe)} here, {found} in transformers; "
                "give an equivalent Hugging Face tokenizer with --tokenizer"
            )
    fast.save_pretrained(destination)


def fast_tokenizer(source: Path) -> Any:
    """The `tokenizers.Tokenizer` that computes what a SentencePiece BPE model computes.

    Only models that leave text as it is (identity normalisation, no dummy prefix) have one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = _read_model(source)
    spec = model.normalizer_spec
    changes = spec.name != "identity" or spec.add_dummy_prefix or spec.remove_extra_whitespaces
    if model.trainer_spec.model_type != 2 or changes:
        raise ConversionError(
            f"{source} is no BPE model with identity normalisation and no dummy prefix; "
            "give an equivalent Hugging Face tokenizer with --tokenizer"
        )
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    has_bytes = any(piece.type == _BYTE for piece in model.pieces)
    bpe = models.BPE(
        vocab=vocab, merges=_merges(model, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    own = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    chat = [text for text in own if text.startswith("<|")]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in chat])
    backend.add_tokens([AddedToken(text, normalized=False) for text in own if text not in chat])
    return backend


def _read_model(source: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConversionError(
            "converting a SentencePiece tokenizer needs protobuf: pip install protobuf"
        ) from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(source.read_bytes())
    return model


def _merges(model: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece prefers them: by the score of what they make."""
    mergeable = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    merges = []
    for piece in model.pieces:
        if piece.type != _NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-piece.score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
