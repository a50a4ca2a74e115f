"""A dialogue that is longer than a row, cut by whole turns from its end."""

from collections.abc import Callable, Sized
from dataclasses import dataclass

from laver_mcore.data.errors import DataError
from laver_mcore.data.records.sample import Sample


@dataclass(frozen=True)
class Cut:
    """What is kept of a dialogue: its first turns, the images in them, and their length in tokens."""

    num_turns: int
    num_images: int
    length: int

    def of(self, sample: Sample) -> Sample:
        """The sample without what was cut."""
        turns, images = sample.turns[: self.num_turns], sample.images[: self.num_images]
        return Sample(key=sample.key, turns=turns, images=images)


def longest_beginning(sample: Sample, seq_length: int, encode: Callable[[Sample], Sized]) -> Cut | None:
    """The longest beginning of a dialogue that ends with an answer and has at most `seq_length` tokens; None where
    there is none. `encode` gives a sample's tokens, DataError for an image without a grid.
    """
    ends = [n + 1 for n, turn in enumerate(sample.turns) if turn.role == "assistant"]
    for num_turns in reversed(ends):
        num_images = sum(turn.num_images for turn in sample.turns[:num_turns])
        try:
            length = len(encode(Cut(num_turns, num_images, 0).of(sample)))
        except DataError:
            continue
        if length <= seq_length:
            return Cut(num_turns, num_images, length)
    return None
