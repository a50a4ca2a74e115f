"""Where Megatron's checkpoints lie, which one is the newest, and what says that two are of one model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config

TRACKER = "latest_checkpointed_iteration.txt"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message is one line."""


def checkpoint_folder(directory: str | Path, iteration: int) -> Path:
    """Folder of one checkpoint, as Megatron names it."""
    return Path(directory) / f"iter_{iteration:07d}"


def latest_iteration(directory: str | Path) -> int | None:
    """Iteration of the newest complete checkpoint under `directory`, or None."""
    tracker = Path(directory) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker} holds {text!r}, not an iteration number")
    return int(text)


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
        "vocab_size": vocab_size,
        "vision": vision.vision,
        "normalize_visual_tokens": bool(vision.normalize_visual_tokens),
    }


def may_start(name: str, stored: dict[str, Any], wanted: Any, new_rows: int) -> bool:
    """Whether a run may start from weights that differ from it in what `identity` calls `name`.

    Adapters start fresh, and so does the visual path of a text model, whose vocabulary grows by `new_rows` tokens for
    vision at the most, those that its tokenizer lacks.
    """
    if name == "lora_rank":
        return not stored["lora_rank"]
    if stored.get("vision") != "none":
        return False
    if name == "vocab_size":
        return 0 < wanted - stored.get("vocab_size", 0) <= new_rows
    return name in ("vision", "normalize_visual_tokens")


def lacks_frozen(directory: str | Path) -> bool:
    """Whether the newest checkpoint of a run holds LoRA's adapters without the weights beside which they stand."""
    iteration = latest_iteration(directory)
    folder = checkpoint_folder(directory, iteration or 0)
    if iteration is None or not (folder / "metadata.json").is_file():
        return False
    return bool(dist_checkpointing.load_common_state_dict(str(folder)).get("without_frozen", False))
