"""One small interface over Hugging Face and SentencePiece tokenizers.

`encode` never produces a special token: whoever writes `<|im_end|>` into a question gets it as plain text. Special
tokens enter a prompt by id only (`prompt.py`). Tokens for vision that a tokenizer lacks follow its own ids.
"""

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from laver_mcore.config.decoders.templates import CHATML
from laver_mcore.data.errors import DataError
from laver_mcore.data.sequence.chat import ChatFormat

VISION_TOKENS = {
    "vision_start": "<|vision_start|>",
    "image_pad": "<|image_pad|>",
    "vision_end": "<|vision_end|>",
}
"""Before an image, in the place of each of its visual tokens, and behind it."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens that structure a prompt; `eos` and `pad` fall back to `end_of_turn` and `eos`.

    An answer ends with `end_of_turn`, which the chat template says, whatever `eos` is.
    """

    end_of_turn: int
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
    def chat(self) -> ChatFormat:
        """How dialogues are written."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the model needs at least this many embedding rows."""

    @property
    def added(self) -> Mapping[str, int]:
        """Tokens for vision that the tokenizer lacks: text -> id, the last ones of the vocabulary."""

    def encode(self, text: str, *, after: str | None = None) -> list[int]:
        """Ids of plain text; no special token is added or recognised.

        `after` says what stands before it, "text" or "special", where it does not begin the prompt: some tokenizers put
        a space before a text that does.
        """

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""

    def fingerprint(self) -> str:
        """Hex digest of everything that changes what a dialogue's tokens are."""


def load_tokenizer(path: str | Path, chat_template: str | None = None, otherwise: str = CHATML) -> Tokenizer:
    """Load a Hugging Face tokenizer directory or a SentencePiece `.model` file.

    Dialogues are written with `chat_template`, or with the tokenizer's own, or `otherwise`. Raises DataError when there
    is no tokenizer, or when it lacks tokens that the template writes.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceTokenizer(path, chat_template, otherwise)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path, chat_template, otherwise)
    raise DataError(f"{path}: no tokenizer; give a Hugging Face directory or a SentencePiece .model file")


class HuggingFaceTokenizer:
    """A tokenizer that transformers' `AutoTokenizer` can load from a directory."""

    def __init__(self, path: Path, chat_template: str | None = None, otherwise: str = CHATML) -> None:
        from transformers import AutoTokenizer

        self._arguments = (path, chat_template, otherwise)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
            # Settings of which nothing can be made may show when the first text is read.
            self._tokenizer.encode("x", add_special_tokens=False, verbose=False)
        except (
            Exception
        ) as error:  # the tokenizers library raises bare ones for a model that it does not know
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"{path}: transformers cannot load a tokenizer from here ({reason})") from None
        # A fast tokenizer changes its own state to encode; two threads at once fail with "Already borrowed".
        self._lock = threading.Lock()
        vocab = self._tokenizer.get_vocab()
        own = max(vocab.values(), default=-1) + 1  # not len(vocab): ids may have gaps
        special = {t.content: i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self._tokenizer, name)
            if token is not None:
                special[self._tokenizer.convert_ids_to_tokens(token)] = token
        self.added = _lacking(vocab, own)
        self.vocab_size = own + len(self.added)
        special |= {text: vocab.get(text, self.added.get(text, -1)) for text in VISION_TOKENS.values()}
        names = {name: str(text) for name, text in self._tokenizer.special_tokens_map.items()}
        template = chat_template or self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.chat = ChatFormat(
            template or otherwise, special, {"bos_token": "", "eos_token": "", **names}, path
        )
        self.special = _special_tokens(
            special, self.chat, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        )
        self._prefix = _Prefix(self._plain, self._after_special)

    def __reduce__(self) -> tuple[Any, ...]:  # neither the lock nor the library's state can be sent along
        return HuggingFaceTokenizer, self._arguments

    def _plain(self, text: str) -> list[int]:
        with self._lock:
            return self._tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )

    def _after_special(self, text: str) -> list[int]:
        end = self._tokenizer.convert_ids_to_tokens(self.special.end_of_turn)
        with self._lock:
            return self._tokenizer.encode(
                f"{end}{text}", add_special_tokens=False, split_special_tokens=False, verbose=False
            )[1:]

    def encode(self, text: str, *, after: str | None = None) -> list[int]:
        return self._prefix.encode(text, after)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        added = {token: text for text, token in self.added.items()}
        with self._lock:
            return _decode(
                ids,
                added,
                skip_special_tokens,
                lambda some: self._tokenizer.decode(
                    some, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
                ),
            )

    def fingerprint(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return _digest(state.encode(), self.chat, self.added)


class SentencePieceTokenizer:
    """A SentencePiece model; its control symbols and user-defined symbols like `<|im_end|>` are special tokens."""

    def __init__(self, path: Path, chat_template: str | None = None, otherwise: str = CHATML) -> None:
        import sentencepiece

        self._arguments = (path, chat_template, otherwise)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            own = self._model.vocab_size()
            pieces = {self._model.id_to_piece(token): token for token in range(own)}
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: a piece that is no Unicode
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"{path}: not a SentencePiece model ({reason})") from None
        special = {
            text: token
            for text, token in pieces.items()
            if self._model.is_control(token) or (text.startswith("<|") and text.endswith("|>"))
        }
        self._user_defined = [text for text in special if text.startswith("<|")]
        self.added = _lacking(pieces, own)
        self.vocab_size = own + len(self.added)
        special |= self.added
        ends = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        names = {name: self._model.id_to_piece(i) if i >= 0 else "" for name, i in ends.items()}
        self.chat = ChatFormat(chat_template or otherwise, special, names, path)
        eos, pad = self._model.eos_id(), self._model.pad_id()
        self.special = _special_tokens(
            special, self.chat, eos if eos >= 0 else None, pad if pad >= 0 else None
        )
        self._special_ids = set(special.values())
        self._special_pattern = re.compile("|".join(map(re.escape, self._user_defined)) or r"(?!)")
        self._prefix = _Prefix(self._plain, self._plain)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, self._arguments

    def _plain(self, text: str) -> list[int]:
        # SentencePiece always recognises its user-defined symbols, so they are cut in two behind the first
        # character; the halves are plain text (with the space that the model puts before a text, if any).
        cuts = [match.start() + 1 for match in self._special_pattern.finditer(text)]
        ids: list[int] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids.extend(self._model.encode(text[start:stop]))
        return ids

    def encode(self, text: str, *, after: str | None = None) -> list[int]:
        return self._prefix.encode(text, after)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        kept = [int(i) for i in ids]
        if skip_special_tokens:
            kept = [i for i in kept if i not in self._special_ids]
        return _decode(
            kept, {i: text for text, i in self.added.items()}, skip_special_tokens, self._model.decode
        )

    def fingerprint(self) -> str:
        return _digest(self._model.serialized_model_proto(), self.chat, self.added)


class _Prefix:
    """Encodes text where it stands, though a tokenizer puts a space before every text that it is given (Llama's do).

    `plain` encodes a text by itself, `behind` one that follows a special token.
    """

    _ANCHOR = "\n"
    _PROBES = ("x", "The", "5", "(")
    _SHORT = 128  # characters; a template's own texts and the questions that a data set repeats

    def __init__(self, plain: Callable[[str], list[int]], behind: Callable[[str], list[int]]) -> None:
        self._plain, self._anchor = plain, plain(self._ANCHOR)
        self._remembered = functools.lru_cache(maxsize=4096)(self._encode)
        self._adds = any(self._within(text) != plain(text) for text in self._PROBES)
        self._adds_behind_special = self._adds and all(behind(text) == plain(text) for text in self._PROBES)

    def _within(self, text: str) -> list[int]:
        """The ids of `text` behind other text: those that it adds to a line break."""
        ids = self._plain(self._ANCHOR + text)
        joined = (
            ids[: len(self._anchor)] != self._anchor
        )  # no tokenizer known here joins a line break to a word
        return self._plain(text) if joined else ids[len(self._anchor) :]

    def encode(self, text: str, after: str | None) -> list[int]:
        return [*self._remembered(text, after)] if len(text) <= self._SHORT else self._encode(text, after)

    def _encode(self, text: str, after: str | None) -> list[int]:
        if self._adds and (after == "text" or (after == "special" and not self._adds_behind_special)):
            return self._within(text)
        return self._plain(text)


def _lacking(vocab: Mapping[str, int], own: int) -> dict[str, int]:
    """Ids behind the vocabulary's own for the tokens of vision that are not in it."""
    missing = [text for text in VISION_TOKENS.values() if text not in vocab]
    return {text: own + index for index, text in enumerate(missing)}


def _special_tokens(
    special: Mapping[str, int], chat: ChatFormat, eos: int | None, pad: int | None
) -> SpecialTokens:
    eos = chat.end_of_turn if eos is None else eos
    vision = {name: special[text] for name, text in VISION_TOKENS.items()}
    return SpecialTokens(end_of_turn=chat.end_of_turn, **vision, eos=eos, pad=eos if pad is None else pad)


def _decode(ids: Iterable[int], added: Mapping[int, str], skip: bool, own: Callable[[list[int]], str]) -> str:
    """Text of ids, those of added tokens among them, which the tokenizer itself does not know."""
    text, some = "", []
    for token in map(int, ids):
        if token not in added:
            some.append(token)
        elif not skip:
            text, some = text + (own(some) if some else "") + added[token], []
    return text + own(some) if some or not text else text


def _digest(state: bytes, chat: ChatFormat, added: Mapping[str, int]) -> str:
    digest = hashlib.blake2b(state, digest_size=16)
    if added or chat.template != CHATML:  # Qwen's is what it was before there were others
        digest.update(repr((chat.template, sorted(added.items()))).encode())
    return digest.hexdigest()
