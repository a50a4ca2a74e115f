"""Qwen's chat template: turns and image grids -> token ids, next-token labels, image spans.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|> x N<|vision_end|>\\nWhat is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n
                        ^^^^^^^^^^^^^^^^ supervised

Shapes: L = tokens of one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.sample import IMAGE_PLACEHOLDER, Turn
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
    """Encode a conversation for training: loss on the assistant's text and its `<|im_end|>` only.

    `grids` holds (height, width) in tokens for each image, in the order of the `<image>` placeholders. A
    system turn at the front replaces `system_prompt`; an empty system prompt writes no system block.
    """
    writer = _Writer(tokenizer, grids)
    writer.conversation(turns, system_prompt)
    return writer.finish()


def encode_prompt(
    turns: Sequence[Turn],
    grids: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    *,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> EncodedSample:
    """Encode turns that await an answer; ends with `<|im_start|>assistant\\n` and supervises nothing."""
    writer = _Writer(tokenizer, grids)
    writer.conversation(turns, system_prompt)
    writer.special(tokenizer.special.im_start)
    writer.text("assistant\n")
    encoded = writer.finish()
    return EncodedSample(
        token_ids_L=encoded.token_ids_L,
        labels_L=np.full_like(encoded.labels_L, IGNORE),
        image_spans=encoded.image_spans,
    )


class _Writer:
    """Appends text and special tokens, remembering which tokens are to be learned and where images are."""

    def __init__(self, tokenizer: Tokenizer, grids: Sequence[tuple[int, int]]) -> None:
        self._tokenizer = tokenizer
        self._grids = list(grids)
        self._ids: list[int] = []
        self._learned: list[tuple[int, int]] = []
        self._spans: list[ImageSpan] = []

    def conversation(self, turns: Sequence[Turn], system_prompt: str) -> None:
        if system_prompt and not (turns and turns[0].role == "system"):
            turns = [Turn("system", system_prompt), *turns]
        for turn in turns:
            if turn.role == "system" and not turn.text:
                continue
            self._turn(turn)

    def special(self, token: int) -> None:
        self._ids.append(token)

    def text(self, text: str) -> None:
        if text:
            self._ids.extend(self._tokenizer.encode(text))

    def finish(self) -> EncodedSample:
        if len(self._spans) != len(self._grids):
            raise DataError(
                f"{len(self._spans)} {IMAGE_PLACEHOLDER} placeholder(s), {len(self._grids)} image(s)"
            )
        token_ids_L = np.array(self._ids, dtype=np.int32)
        labels_L = np.full_like(token_ids_L, IGNORE)
        for start, stop in self._learned:  # a role header stands before every answer, so start >= 1
            labels_L[start - 1 : stop - 1] = token_ids_L[start:stop]
        return EncodedSample(token_ids_L=token_ids_L, labels_L=labels_L, image_spans=tuple(self._spans))

    def _turn(self, turn: Turn) -> None:
        self.special(self._tokenizer.special.im_start)
        if turn.role == "assistant":
            # Header and answer are encoded apart, as generation sees them.
            self.text("assistant\n")
            start = len(self._ids)
            self.text(turn.text)
            self.special(self._tokenizer.special.im_end)
            self._learned.append((start, len(self._ids)))
        elif turn.role == "user":
            # No merge across the header, text and images: special tokens are boundaries to the tokenizer.
            first, *rest = turn.split()
            self.text(f"user\n{first}")
            for text in rest:
                self._image()
                self.text(text)
            self.special(self._tokenizer.special.im_end)
        else:
            self.text(f"{turn.role}\n{turn.text}")
            self.special(self._tokenizer.special.im_end)
        self.text("\n")

    def _image(self) -> None:
        special = self._tokenizer.special
        index = len(self._spans)
        if index >= len(self._grids):
            raise DataError(f"more {IMAGE_PLACEHOLDER} placeholders than the {len(self._grids)} image(s)")
        height, width = self._grids[index]
        self.special(special.vision_start)
        self._spans.append(ImageSpan(len(self._ids), height, width))
        self._ids.extend([special.image_pad] * (height * width))
        self.special(special.vision_end)
