"""Where Megatron's checkpoints lie, which one is the newest, and what says that two are of one model."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laver_mcore.config.architecture import PROJECTIONS
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config

TRACKER = "latest_checkpointed_iteration.txt"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message is one line."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it are as they were. The message is one line."""


def reason_of(error: BaseException) -> str:
    """One line for an error of PyTorch or Megatron-Core: of the first rank that failed, in the system's words."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        inner = next(iter(failures.values()))
        return reason_of(inner[0] if isinstance(inner, tuple) else inner)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            known = os.strerror(seen.errno)
            return known if seen.strerror in (None, known) else f"{known}: {seen.strerror}"
        seen = seen.__cause__ or seen.__context__
    if "unexpected pos" in str(error):  # PyTorch's word for a write that the system refused
        return "a file could not be written whole, as on a full disk"
    return (str(error) or type(error).__name__).strip().split("\n")[0][:200]


def checkpoint_folder(directory: str | Path, iteration: int) -> Path:
    """Folder of one checkpoint, as Megatron names it."""
    return Path(directory) / f"iter_{iteration:07d}"


def identity(config: Config, vocab_size: int) -> dict[str, Any]:
    """What a checkpoint must share with the run that loads it."""
    model = asdict(config.model)
    names = (
        "family",
        "lora_rank",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "untie_embeddings_and_output_weights",
    )
    shape = {name: model[name] for name in names}
    vision = config.vision
    return {
        **shape,
        "lora_targets": [
            PROJECTIONS[layer][i] for layer, ids in config.model.adapted_layers.items() for i in ids
        ],
        "vocab_size": vocab_size,
        "vision": vision.vision,
        "normalize_visual_tokens": bool(vision.normalize_visual_tokens),
    }


def tokenizer_identity(config: Config, digest: str | None) -> dict[str, str | None]:
    """What a checkpoint says of the run's tokenizer: where it lay, and the digest of its content."""
    return {"path": config.data.tokenizer_model, "digest": digest}


def check_tokenizer(
    folder: Path, common: dict[str, Any], path: str | Path | None, digest: str | None
) -> None:
    """`CheckpointError` where a checkpoint's weights learned other tokens than those of the tokenizer at `path`.

    One that does not say, of an older run or a conversion, goes with any.
    """
    trained = common.get("tokenizer") or {}
    if None not in (digest, trained.get("digest")) and trained["digest"] != digest:
        raise CheckpointError(
            f"{folder} was trained with the tokenizer {trained['path']} of content {trained['digest']}, but {path} has "
            f"content {digest} (vocabulary, merges or chat template differ); name the one it was trained with"
        )


def may_start(name: str, stored: dict[str, Any], wanted: Any, new_rows: int) -> bool:
    """Whether a run may start from weights that differ from it in what `identity` calls `name`.

    Adapters start fresh, and so does the visual path of a text model, whose vocabulary grows by `new_rows` tokens for
    vision at the most, those that its tokenizer lacks.
    """
    if name in ("lora_rank", "lora_targets"):
        return not stored["lora_rank"]
    if stored.get("vision") != "none":
        return False
    if name == "vocab_size":
        return 0 < wanted - stored.get("vocab_size", 0) <= new_rows
    return name in ("vision", "normalize_visual_tokens")
