"""An exported model that answers chat messages: what both evaluation frameworks need of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

Messages = list[dict[str, Any]]


class AnsweringModel:
    """Loads a directory that `mcore_to_hf.py` wrote; ValueError for one with code of its own that is not trusted."""

    def __init__(
        self, path: str, *, device: str = "cuda", dtype: str = "auto", trust_remote_code: bool = False
    ) -> None:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in config and not trust_remote_code:
            raise ValueError(f"{path} brings Python code of its own; read it and set trust_remote_code=True")
        kind: dict[str, Any] = dict(trust_remote_code=trust_remote_code, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **kind)
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, **kind)
        self.tokenizer = self.processor.tokenizer

    def answer(
        self,
        conversations: Sequence[Messages],
        images: Sequence[Sequence[Image.Image]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float | None = None,
        num_beams: int = 1,
        until: Sequence[str] = (),
    ) -> list[str]:
        """One answer per conversation, cut before the first of `until`; `images[i]` are those of
        conversation i.
        """
        inputs = self._inputs(conversations, images)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
        with torch.inference_mode():
            generated = self.model.generate(
                **inputs, **sampling, max_new_tokens=max_new_tokens, num_beams=num_beams
            )
        new = generated[:, inputs["input_ids"].shape[1] :]
        answers = self.tokenizer.batch_decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [_cut(answer, until) for answer in answers]

    def log_likelihood(
        self, conversation: Messages, images: Sequence[Image.Image], continuation: str
    ) -> tuple[float, bool]:
        """Summed log-probability of `continuation` as the answer, and whether it is the greedy one."""
        inputs = self._inputs([conversation], [images])
        ids = self.tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids.to(self.model.device)
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, prompt - 1 : -1].float()
        scores = logits.log_softmax(-1).gather(1, ids[0][:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == ids[0]).all())

    def _inputs(self, conversations: Sequence[Messages], images: Sequence[Sequence[Image.Image]]) -> Any:
        texts = [
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        flat = [image for each in images for image in each]
        inputs = self.processor(
            text=texts, images=flat or None, padding=True, padding_side="left", return_tensors="pt"
        )
        return inputs.to(self.model.device)


def _cut(answer: str, until: Sequence[str]) -> str:
    places = [answer.find(stop) for stop in until if stop and stop in answer]
    return answer[: min(places)] if places else answer
