"""Documents of the demo's held-out file: the first question about each page."""

import os
from pathlib import Path
from typing import Any

from PIL import Image


def _folder() -> Path:
    return Path(os.environ.get("LAVER_DEMO", "data/demo"))


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The page."""
    names = doc["image"] if isinstance(doc["image"], list) else [doc["image"]]
    return [Image.open(_folder() / name).convert("RGB") for name in names]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, without the image's place."""
    return doc["conversations"][0]["value"].replace("<image>\n", "").replace("<image>", "")


def doc_to_messages(
    doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict]:
    """The question as a chat message, the page first, as in training."""
    content = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc_to_text(doc)}]}]


def doc_to_target(doc: dict[str, Any]) -> str:
    """The answer."""
    return doc["conversations"][1]["value"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer is right to the letter."""
    return {"exact_match": float(results[0].strip() == doc_to_target(doc).strip())}
