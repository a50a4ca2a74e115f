"""One small interface over Hugging Face and SentencePiece tokenizers.

`encode` never produces a special token: whoever writes `<|im_end|>` into a question gets it as plain text.
Special tokens enter a prompt by id only (`prompt.py`).
"""

import hashlib
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from laver_mcore.data.errors import DataError

CHAT_TOKENS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "image_pad": "<|image_pad|>",
    "vision_end": "<|vision_end|>",
}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens that structure a prompt; `eos` and `pad` fall back to `im_end` and `eos`.

    An answer ends with `im_end`, whatever `eos` is.
    """

    im_start: int
    im_end: int
    vision_start: int
    image_pad: int
    vision_end: int
    eos: int
    pad: int


class Tokenizer(Protocol):
    """What prompts need from a tokenizer."""

    @property
    def special(self) -> SpecialTokens: ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the model needs at least this many embedding rows."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no special token is added or recognised."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""

    def fingerprint(self) -> str:
        """Hex digest of everything that changes what `encode` returns."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face tokenizer directory or a SentencePiece `.model` file.

    Raises DataError when there is none, or when it lacks one of the chat and vision tokens.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceTokenizer(path)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise DataError(f"{path}: no tokenizer; give a Hugging Face directory or a SentencePiece .model file")


class HuggingFaceTokenizer:
    """A tokenizer that transformers' `AutoTokenizer` can load from a directory."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self._path = path
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"{path}: transformers cannot load a tokenizer from here ({reason})") from None
        # A fast tokenizer changes its own state to encode; two threads at once fail with "Already borrowed".
        self._lock = threading.Lock()
        vocab = self._tokenizer.get_vocab()
        self._vocab_size = max(vocab.values(), default=-1) + 1  # not len(vocab): ids may have gaps
        ids = {name: vocab.get(text) for name, text in CHAT_TOKENS.items()}
        fix = "add them with tokenizer.add_special_tokens and save the tokenizer again"
        self.special = _special_tokens(
            ids, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id, path, fix
        )

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def __reduce__(self) -> tuple[Any, ...]:  # neither the lock nor the library's state can be sent along
        return HuggingFaceTokenizer, (self._path,)

    def encode(self, text: str) -> list[int]:
        with self._lock:
            return self._tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        with self._lock:
            return self._tokenizer.decode(
                [int(i) for i in ids],
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )

    def fingerprint(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


class SentencePieceTokenizer:
    """A SentencePiece model whose chat and vision tokens are user-defined symbols."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"{path}: not a SentencePiece model ({reason})") from None
        unknown = self._model.unk_id()
        found = {name: self._model.piece_to_id(text) for name, text in CHAT_TOKENS.items()}
        ids = {name: None if token == unknown else token for name, token in found.items()}
        eos, pad = self._model.eos_id(), self._model.pad_id()
        fix = "train the model with them in user_defined_symbols"
        self.special = _special_tokens(ids, eos if eos >= 0 else None, pad if pad >= 0 else None, path, fix)
        self._special_ids = {getattr(self.special, field.name) for field in fields(self.special)}
        self._special_pattern = re.compile("|".join(map(re.escape, CHAT_TOKENS.values())))

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._path,)

    def encode(self, text: str) -> list[int]:
        # SentencePiece always recognises its user-defined symbols, so they are cut in two behind the first
        # character; the halves are plain text (with the space that the model puts before a text, if any).
        cuts = [match.start() + 1 for match in self._special_pattern.finditer(text)]
        ids: list[int] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids.extend(self._model.encode(text[start:stop]))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        kept = [int(i) for i in ids]
        if skip_special_tokens:
            kept = [i for i in kept if i not in self._special_ids]
        return self._model.decode(kept)

    def fingerprint(self) -> str:
        return hashlib.blake2b(self._model.serialized_model_proto(), digest_size=16).hexdigest()


def _special_tokens(
    ids: dict[str, int | None], eos: int | None, pad: int | None, path: Path, fix: str
) -> SpecialTokens:
    missing = [CHAT_TOKENS[name] for name, token in ids.items() if token is None]
    if missing:
        raise DataError(f"{path}: the tokenizer lacks {', '.join(missing)}; {fix}")
    found = {name: token for name, token in ids.items() if token is not None}
    eos = found["im_end"] if eos is None else eos
    return SpecialTokens(**found, eos=eos, pad=eos if pad is None else pad)
