"""Random numbers as a pure function of names: no generator state to save, equal under every layout.

Only the raw bits of Philox are used, because NumPy guarantees bit streams across releases and does not
guarantee the streams of `Generator` methods.
"""

import hashlib

import numpy as np


def random_bits(num: int, *names: str | int) -> np.ndarray:
    """`num` uint64 numbers that depend on `names` alone (Philox, keyed by a BLAKE2b hash of the names)."""
    # int(): a NumPy integer prints differently from an equal Python one.
    text = repr([name if isinstance(name, str) else int(name) for name in names])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(num)


def permutation(num: int, *names: str | int) -> np.ndarray:
    """A permutation of `range(num)` (int64) that depends on `names` alone."""
    return np.argsort(random_bits(num, *names), kind="stable")
