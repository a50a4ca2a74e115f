"""Data that a user has to change: one exception, and the boundary around what one sample can provoke."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_ADDRESS = re.compile(r" object at 0x[0-9a-fA-F]+|0x[0-9a-fA-F]{6,}")
_LONGEST_REASON = 200


class DataError(ValueError):
    """Data that cannot be trained on; its text is one line: what was found, what was wanted, the fix.

    `kind` is what rejects are counted by: record, image, video, audio, or filtered (left out by choice).
    """

    def __init__(self, message: str, *, kind: str = "record") -> None:
        super().__init__(message)
        self.kind = kind


def reason(error: BaseException) -> str:
    """The first line of a library's error, shortened, the same from run to run (no memory addresses)."""
    text = (str(error) or type(error).__name__).strip().split("\n")[0]
    return shortened(_ADDRESS.sub("", text), _LONGEST_REASON)


def shortened(text: str, longest: int = 80) -> str:
    """`text`, its middle left out where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


@contextmanager
def one_sample(where: str) -> Iterator[None]:
    """Whatever a sample provokes in a library becomes a DataError about that sample: the others go on."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: {type(error).__name__}: {reason(error)}") from None
