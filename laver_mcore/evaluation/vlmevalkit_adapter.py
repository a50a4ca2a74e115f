"""VLMEvalKit: copy or import this class into `vlmeval/vlm` and add it to `vlmeval/config.py` (see
README.md).
"""

from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from laver_mcore.evaluation.answering import AnsweringModel


class Laver(BaseModel):
    """An exported LaVer model; images and texts may be interleaved."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        device: str = "cuda",
        max_new_tokens: int = 512,
        trust_remote_code: bool = False,
        **_: Any,
    ) -> None:
        self.answering = AnsweringModel(model_path, device=device, trust_remote_code=trust_remote_code)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The greedy answer to parts of type image (value: path) and text."""
        content: list[dict[str, str]] = []
        images = []
        for part in message:
            if part["type"] == "image":
                images.append(Image.open(part["value"]))
                content.append({"type": "image"})
            elif part["type"] == "text":
                content.append({"type": "text", "text": part["value"]})
        conversation = [{"role": "user", "content": content}]
        return self.answering.answer([conversation], [images], max_new_tokens=self.max_new_tokens)[0]
