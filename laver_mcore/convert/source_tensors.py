"""Every tensor of a source directory, accounted for: used, derivable from another, or a reason to refuse it all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from laver_mcore.convert.distributed_checkpoint import row_blocks
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.safetensors_directory import Weights

COMPUTED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that the config says again."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class SourceTensors:
    """Names of a source's tensors by what became of them."""

    used: Sequence[str]
    derived: Sequence[str]

    def __str__(self) -> str:
        derived = f" ({', '.join(self.derived)})" if self.derived else ""
        return f"{len(self.used)} tensors used, {len(self.derived)} derived{derived}, none left out"


def account(
    weights: Weights,
    expected: Mapping[str, tuple[int, ...]],
    where: str | Path,
    *,
    tied: bool,
    family: str | None,
) -> SourceTensors:
    """Sort the tensors of a decoder whose parts are `expected`, name -> shape.

    `tied`: the config says that the LM head is the embedding; one that differs is refused, for either of the two
    may be what was meant. Raises `ConversionError` for a tensor that is missing, of another shape, or unknown.
    """
    for name, wanted in expected.items():
        if name not in weights:
            raise ConversionError(f"{where} has no {name}; its config.json asks for {list(wanted)}")
        found, _ = weights.describe(name)
        if found != wanted:
            raise ConversionError(
                f"{where}: {name} is {list(found)}, its config.json asks for {list(wanted)}"
            )
    derived = []
    for name in weights:
        if name in expected:
            continue
        if tied and name == HEAD:
            _check_head_is_embedding(weights, where)
        elif not name.endswith(COMPUTED):
            raise ConversionError(
                f"{where}: {name} has no place in a {family} decoder; is this another architecture?"
            )
        derived.append(name)
    return SourceTensors(used=sorted(expected), derived=sorted(derived))


def refuse_doubles(weights: Weights, where: str | Path) -> None:
    """`ConversionError` where tensors are of 64 bits, which no checkpoint here keeps: the user says to what to cast."""
    for name in weights:
        if weights.describe(name)[1] == torch.float64:
            raise ConversionError(f"{where}: {name} is F64; give --dtype to cast")


def _check_head_is_embedding(weights: Weights, where: str | Path) -> None:
    shape, dtype = weights.describe(EMBEDDING)
    same = weights.describe(HEAD)[0] == shape
    for start, stop in row_blocks(shape, dtype) if same else ():
        same = same and torch.equal(weights.rows(HEAD, start, stop), weights.rows(EMBEDDING, start, stop))
    if not same:
        raise ConversionError(
            f"{where}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set it to false in "
            f"config.json to keep the head, or delete {HEAD} to leave it out"
        )
