"""Damaged and senseless input for every reader: refused in one line or read, never a traceback, a hang, or a bad mark.

`make fuzz` draws 10,000; here a few of each. LAVER_FUZZ_SEED gives others; a fault names the draw that found it.
"""

import os
import signal
from random import Random

import pytest
from fuzz import directories, readers
from long import LONG

SHARES = {
    readers.json_records: 30,
    readers.parquet: 8,
    readers.arrow: 8,
    readers.webdataset: 10,
    readers.images: 12,
    readers.preprocessor_config: 8,
    readers.recipe_file: 6,
    readers.flags: 6,
    directories.hf_config: 6,
    directories.sentencepiece: 2,
    directories.tokenizer_json: 2,
    directories.tower: 2,
}
"""Reader -> its share of the draws, of 100."""
NUM_DRAWS = int(os.environ.get("LAVER_FUZZ", "40"))
SEED = os.environ.get("LAVER_FUZZ_SEED", "0")
LONGEST = 60  # seconds for one input


def hangs(*_: object) -> None:
    raise AssertionError(f"an input took more than {LONGEST} s")


PARAMETERS = [
    pytest.param(reader, id=reader.__name__, marks=LONG if reader is readers.images else ())
    for reader in SHARES
]


@pytest.mark.parametrize("reader", PARAMETERS)
def test_a_reader_refuses_or_reads(reader, tmp_path):
    draw = reader(tmp_path)
    signal.signal(signal.SIGALRM, hangs)
    faults = []
    for number in range(max(1, NUM_DRAWS * SHARES[reader] // 100)):
        signal.alarm(LONGEST)
        try:
            draw(Random(f"{SEED} {number}"))
        except Exception as error:
            faults.append((number, type(error).__name__, str(error)[:300]))
        finally:
            signal.alarm(0)
    assert not faults, f"{len(faults)} draws of seed {SEED}: {faults[:5]}"
