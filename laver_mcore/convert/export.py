"""A run's checkpoint as a Hugging Face directory."""

from pathlib import Path

import torch

from laver_mcore.convert.decoder import export_decoder, open_run
from laver_mcore.convert.errors import ConversionError


def export_run(
    load: str | Path,
    save: str | Path,
    *,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
    decoder_only: bool = False,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a run's newest checkpoint: a text model, or the whole image-text model where the run has a
    visual path.
    """
    config, _ = open_run(load)
    if decoder_only or config.vision.vision == "none":
        export_decoder(load, save, dtype=dtype, teacher=teacher, companions=tokenizer)
        return
    raise ConversionError(f"vision={config.vision.vision} cannot be exported; use --decoder-only")
