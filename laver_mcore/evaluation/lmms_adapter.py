"""lmms-eval: `python -m lmms_eval --model laver --model_args pretrained=DIR --tasks ...`. A chat model, which
lmms-eval asks for generation only.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.protocol import ChatMessages
from PIL import Image

from laver_mcore.evaluation.answering import AnsweringModel, Messages


@register_model("laver")
class Laver(lmms):
    """An exported LaVer model; data-parallel over processes where lmms-eval is launched with several."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str = "cuda",
        batch_size: int | str = 1,
        dtype: str = "auto",
        trust_remote_code: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise ValueError(
                f"unknown model_args {sorted(kwargs)}; use pretrained, device, batch_size, dtype, "
                "trust_remote_code"
            )
        self.batch_size_per_gpu = int(batch_size)
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.answering = AnsweringModel(
            pretrained, device=device, dtype=dtype, trust_remote_code=str(trust_remote_code) == "True"
        )

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts the tensors that it exchanges between processes."""
        return self.answering.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of `requests`; requests with equal settings share batches."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[-4]
            groups.setdefault(repr(sorted(settings.items(), key=str)), []).append(index)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size_per_gpu):
                batch = members[start : start + self.batch_size_per_gpu]
                for index, answer in zip(batch, self._answer([requests[i] for i in batch]), strict=True):
                    answers[index] = answer
        return answers

    def _conversation(self, request: Any) -> tuple[Messages, Sequence[Image.Image]]:
        # lmms-eval 0.7 puts the formatted text before the five that its model guide documents.
        doc_to_messages, _, doc_id, task, split = request.args[-5:]
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return messages.to_hf_messages(), messages.extract_media()[0]

    def _answer(self, requests: list[Any]) -> list[str]:
        conversations, images = zip(*(self._conversation(request) for request in requests), strict=True)
        settings = requests[0].args[-4]
        until = settings.get("until") or []
        return self.answering.answer(
            conversations,
            images,
            max_new_tokens=settings.get("max_new_tokens", 128),
            temperature=settings.get("temperature") or 0.0,
            top_p=settings.get("top_p"),
            num_beams=settings.get("num_beams") or 1,
            until=[until] if isinstance(until, str) else until,
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Score of each request's target as the answer to its question and images."""
        results = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
            images = doc_to_visual(doc)
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": context}]
            conversation = [{"role": "user", "content": content}]
            results.append(self.answering.log_likelihood(conversation, images, str(target)))
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("multi-round generation is not supported")


def model_manifest() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="laver", chat_class_path="laver_mcore.evaluation.lmms_adapter.Laver")
