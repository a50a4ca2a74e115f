"""A run's tokenizer and prompt format as files that transformers loads: tokenizer.json,
chat_template.jinja.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from laver_mcore.config.decoders.templates import CHATML
from laver_mcore.convert.decoder import COMPANIONS
from laver_mcore.convert.errors import ConversionError
from laver_mcore.data.sequence.tokenizer import VISION_TOKENS, Tokenizer, load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece's piece types
_SPACE = "\u2581"
_PROBES = (
    "What digit is in row 2, column 3?",
    "user\nRead it out.",
    "a  b\n c",
    "Größe 7, 東京 <|im_end|x",
    "0123456789",
)

# What stands before the training's own template: the recipe's system turn where a conversation brings none, and images
# as their tokens, each followed by a line break.
_PRELUDE = """\
{%- set enable_thinking = false %}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- set prepared = namespace(messages=[], text='') %}
{%- if SYSTEM and messages[0]['role'] != 'system' %}
{%- set prepared.messages = [{'role': 'system', 'content': SYSTEM}] %}
{%- endif %}
{%- for message in messages %}
{%- if message['content'] is string %}{% set prepared.text = message['content'] %}
{%- else %}
{%- set prepared.text = '' %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{%- set prepared.text = prepared.text + '<|vision_start|><|image_pad|><|vision_end|>\\n' %}
{%- elif part['type'] == 'text' %}{% set prepared.text = prepared.text + part['text'] %}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- set prepared.messages = prepared.messages + [{'role': message['role'], 'content': prepared.text}] %}
{%- endfor %}
{%- set messages = prepared.messages %}
"""


def chat_template(system_prompt: str, template: str = CHATML) -> str:
    """Jinja template that writes conversations as training does, with the recipe's default system prompt."""
    return "{%- set SYSTEM = " + json.dumps(system_prompt) + " %}" + _PRELUDE + template


def export_tokenizer(
    source: str | Path,
    destination: Path,
    system_prompt: str,
    templates: tuple[str | None, str] = (None, CHATML),
) -> Tokenizer:
    """Write tokenizer and chat template into `destination`; returns the tokenizer that the engine itself uses.

    `templates` are `chat_templates`'s. Tokens for vision that the source lacks are in what is written.
    """
    tokenizer = load_tokenizer(source, *templates)
    if Path(source).is_dir():
        for name in COMPANIONS:
            if (Path(source) / name).is_file() and not name.startswith(("generation", "chat_template")):
                shutil.copyfile(Path(source) / name, destination / name)
        if tokenizer.added:
            _export_with_added(source, destination, tokenizer)
    else:
        _export_sentencepiece(Path(source), destination, tokenizer)
    written = chat_template(system_prompt, tokenizer.chat.template)
    (destination / "chat_template.jinja").write_text(written, encoding="utf-8")
    return tokenizer


def _export_with_added(source: str | Path, destination: Path, tokenizer: Tokenizer) -> None:
    """Transformers' tokenizer of a directory with the engine's tokens for vision, under the engine's ids."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    theirs.add_special_tokens(
        {"additional_special_tokens": list(tokenizer.added)}, replace_extra_special_tokens=False
    )
    _check_added(theirs, source, tokenizer)
    theirs.chat_template = None
    theirs.save_pretrained(destination)


def _check_added(theirs: Any, source: str | Path, tokenizer: Tokenizer) -> None:
    found = {text: theirs.convert_tokens_to_ids(text) for text in tokenizer.added}
    if found != tokenizer.added:
        raise ConversionError(
            f"{source}: transformers numbers added tokens {found}, training {dict(tokenizer.added)}; "
            "add them to the tokenizer and train with that"
        )


def _export_sentencepiece(source: Path, destination: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = fast_tokenizer(source)
    names = {token: text for text, token in backend.get_vocab().items()}
    special = tokenizer.special
    own = [text for text in VISION_TOKENS.values() if text not in tokenizer.added]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.chat.names.get("bos_token") or None,  # for templates that begin with it
        eos_token=names[special.end_of_turn],
        pad_token=names[special.pad],
        padding_side="left",
        additional_special_tokens=list(dict.fromkeys([names[special.end_of_turn], *own, *tokenizer.added])),
        clean_up_tokenization_spaces=False,
    )
    _check_added(fast, source, tokenizer)
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
