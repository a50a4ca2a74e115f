"""Turns and image grids -> token ids, next-token labels, image spans; written as the tokenizer's chat template says.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|> x N<|vision_end|>\\nWhat is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n
                        ^^^^^^^^^^^^^^^^ learned

Shapes: L = tokens of one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.sample import IMAGE_PLACEHOLDER, Turn
from laver_mcore.data.sequence.chat import Slot, cut
from laver_mcore.data.sequence.tokenizer import Tokenizer

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
IGNORE = -100

Segment = tuple[Literal["text"], int] | tuple[Literal["image"], int, int]


@dataclass(frozen=True)
class ImageSpan:
    """The visual tokens of one image: [start, start + height * width) of the sample, row by row."""

    start: int
    height: int
    width: int

    @property
    def stop(self) -> int:
        return self.start + self.height * self.width


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSample:
    """One conversation as tokens.

    `labels_L[i]` is the id to be predicted at position i (that of token i + 1), or -100 where nothing is
    learned, the last position included.
    """

    token_ids_L: np.ndarray  # int32
    labels_L: np.ndarray  # int32
    image_spans: tuple[ImageSpan, ...]

    def __len__(self) -> int:
        return len(self.token_ids_L)

    def segments(self) -> list[Segment]:
        """The sample as one document for `dialogue_layout`: runs of text and images, in order."""
        parts: list[Segment] = []
        end = 0
        for span in self.image_spans:
            if span.start > end:
                parts.append(("text", span.start - end))
            parts.append(("image", span.height, span.width))
            end = span.stop
        if len(self) > end:
            parts.append(("text", len(self) - end))
        return parts


def encode_sample(
    turns: Sequence[Turn],
    grids: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    *,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> EncodedSample:
    """Encode a conversation for training: loss on the assistant's text and the token that ends it only.

    `grids` holds (height, width) in tokens for each image, in the order of the `<image>` placeholders. A
    system turn at the front replaces `system_prompt`; an empty one leaves it to the template what stands there.
    """
    writer = _Writer(tokenizer, grids)
    writer.conversation(turns, system_prompt)
    return writer.finish()


def text_length(
    turns: Sequence[Turn],
    num_images: int,
    tokenizer: Tokenizer,
    *,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> int:
    """Tokens of a conversation for training without the visual ones, the two around each image included."""
    writer = _Writer(tokenizer, [(0, 0)] * num_images)
    writer.conversation(turns, system_prompt)
    return writer.length()


def encode_prompt(
    turns: Sequence[Turn],
    grids: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    *,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> EncodedSample:
    """Encode turns that await an answer; ends with `<|im_start|>assistant\\n` and supervises nothing."""
    writer = _Writer(tokenizer, grids)
    writer.conversation(turns, system_prompt, ask=True)
    encoded = writer.finish()
    return EncodedSample(
        token_ids_L=encoded.token_ids_L,
        labels_L=np.full_like(encoded.labels_L, IGNORE),
        image_spans=encoded.image_spans,
    )


class _Writer:
    """Appends text and special tokens, remembering which tokens are to be learned and where images are.

    Texts that meet are encoded as one, except at an image and where an answer begins, as generation sees it.
    """

    def __init__(self, tokenizer: Tokenizer, grids: Sequence[tuple[int, int]]) -> None:
        self._tokenizer = tokenizer
        self._grids = list(grids)
        self._ids: list[int] = []
        self._learned: list[tuple[int, int]] = []
        self._spans: list[ImageSpan] = []
        self._waiting = ""
        self._after: str | None = None

    def conversation(self, turns: Sequence[Turn], system_prompt: str, ask: bool = False) -> None:
        if system_prompt and not (turns and turns[0].role == "system"):
            turns = [Turn("system", system_prompt), *turns]
        turns = [turn for turn in turns if turn.role != "system" or turn.text]
        slots: list[Slot] = []
        texts: list[list[str]] = []
        for turn in turns:
            slot, text = cut(turn.role, turn.split())
            slots.append(slot)
            texts.append(text)
        start = 0
        for piece in self._tokenizer.chat.pieces(tuple(slots), ask):
            if piece.kind == "special":
                self._special(piece.token)
            elif piece.kind == "text":
                self._waiting += piece.text
            elif piece.kind == "turn":
                self._turn(texts[piece.turn])
            else:
                self._flush()
                if piece.kind == "stop":
                    self._learned.append((start, len(self._ids)))
                start = len(self._ids)
        self._flush()

    def length(self) -> int:
        if len(self._spans) != len(self._grids):
            raise DataError(
                f"{len(self._spans)} {IMAGE_PLACEHOLDER} placeholder(s), {len(self._grids)} image(s)"
            )
        return len(self._ids)

    def finish(self) -> EncodedSample:
        self.length()
        token_ids_L = np.array(self._ids, dtype=np.int32)
        labels_L = np.full_like(token_ids_L, IGNORE)
        for start, stop in self._learned:
            start = max(start, 1)  # nothing predicts the first token
            labels_L[start - 1 : stop - 1] = token_ids_L[start:stop]
        return EncodedSample(token_ids_L=token_ids_L, labels_L=labels_L, image_spans=tuple(self._spans))

    def _special(self, token: int) -> None:
        self._flush()
        self._ids.append(token)
        self._after = "special"

    def _flush(self) -> None:
        if self._waiting:
            self._ids.extend(self._tokenizer.encode(self._waiting, after=self._after))
            self._waiting, self._after = "", "text"

    def _turn(self, texts: Sequence[str]) -> None:
        first, *rest = texts
        self._waiting += first
        for text in rest:
            self._image()
            self._waiting += text

    def _image(self) -> None:
        special = self._tokenizer.special
        index = len(self._spans)
        if index >= len(self._grids):
            raise DataError(f"more {IMAGE_PLACEHOLDER} placeholders than the {len(self._grids)} image(s)")
        height, width = self._grids[index]
        self._special(special.vision_start)
        self._spans.append(ImageSpan(len(self._ids), height, width))
        self._ids.extend([special.image_pad] * (height * width))
        self._special(special.vision_end)
