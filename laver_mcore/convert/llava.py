"""A run as LLaVA (`LlavaForConditionalGeneration`), the architecture that other servers have: vLLM, SGLang, llama.cpp.

LLaVA is a CLIP or SigLIP tower read at one layer, two linear layers, and a causal decoder with 1D positions. A run that
computes exactly that needs no code of ours; one that does not is refused, each reason by its flag.

A tower is cut behind the layer that is read, so the last one left is what LLaVA reads. It is read before the tower's
final norm, which is why SigLIP's last layer, which LaVer norms, is none of LLaVA's.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from laver_mcore.config.hugging_face import text_config
from laver_mcore.config.schema import Config
from laver_mcore.convert.distributed_checkpoint import CheckpointReader
from laver_mcore.convert.safetensors_directory import TensorToWrite
from laver_mcore.model.vision_encoders import read_config

SERVERS = "vLLM, SGLang and llama.cpp"
TOWERS = ("clip", "siglip")
"""Towers that those servers have."""
_CONNECTOR = {"connector.layers.0.": "linear_1.", "connector.layers.2.": "linear_2."}


def differences(config: Config) -> list[str]:
    """What a run computes that LLaVA does not; none: it can be exported as LLaVA."""
    vision, model, attention = config.vision, config.model, config.attention
    width = vision.connector_hidden_size or model.hidden_size
    assert model.hidden_size and model.num_attention_heads
    even = model.hidden_size // model.num_attention_heads
    found = {
        "mixed attention (--no-mixed-attention)": attention.mixed_attention,
        "2D positions (--no-rope-2d)": attention.rope_2d,
        f"{vision.vision} images (--vision clip or siglip)": vision.vision not in TOWERS,
        "SigLIP read behind its final norm (--vision-layer -2)": vision.vision == "siglip"
        and vision.vision_layer == -1,
        "visual tokens of unit length (ViCToR)": bool(vision.normalize_visual_tokens),
        f"connector of width {width} (--connector-hidden-size {model.hidden_size})": width
        != model.hidden_size,
        # transformers reads `head_dim` of a Qwen2 or Llama, vLLM does not of the first.
        f"heads of width {model.kv_channels} (--kv-channels {even})": model.family == "qwen2"
        and model.kv_channels != even,
        "CLS token among the visual ones (--vision-select patch)": vision.vision_select != "patch",
    }
    return [what for what, differs in found.items() if differs]


def vision_config(config: Config, num_layers: int) -> dict[str, Any]:
    """The tower's own settings, what published files leave out filled in, with as many layers as are left of it."""
    kind, tower = config.vision.vision, config.vision.tower
    assert tower is not None
    assert config.vision.vision_path is not None
    return tower.filled(read_config(config.vision.vision_path, kind)) | dict(
        model_type=f"{kind}_vision_model", num_hidden_layers=num_layers, vision_use_head=False
    )


def model_config(
    config: Config, vocab_size: int, image_token_id: int, dtype: torch.dtype, reader: CheckpointReader
) -> dict[str, Any]:
    """The content of config.json."""
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key in reader if ".encoder.layers." in key}
    vision = vision_config(config, len(layers))
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": str(dtype).removeprefix("torch."),
        "text_config": text_config(config.model, vocab_size),
        "tie_word_embeddings": not config.model.untie_embeddings_and_output_weights,
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": _strategy(config),
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_token_id": image_token_id,
        "image_token_index": image_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }


def processor_config(patch_size: int, config: Config, image_token: str) -> dict[str, Any]:
    """The content of processor_config.json; an image is as many tokens as it has patches."""
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "vision_feature_select_strategy": _strategy(config),
        "num_additional_image_tokens": int(_strategy(config) == "default"),
        "image_token": image_token,
    }


def tensors_of(decoder: Iterable[TensorToWrite], visual: Iterable[TensorToWrite]) -> list[TensorToWrite]:
    """The tensors of a run under LLaVA's names, as its published checkpoints have them.

    The final norm, which LLaVA has and does not read, is made up where the run left it out.
    """
    found = [replace(tensor, name=f"language_model.{tensor.name}") for tensor in decoder]
    for tensor in visual:
        name = tensor.name.replace("vision_encoder.tower.", "vision_tower.vision_model.")
        for ours, theirs in _CONNECTOR.items():
            name = name.replace(ours, f"multi_modal_projector.{theirs}")
        found.append(replace(tensor, name=name))
    present = {tensor.name for tensor in found}
    width = next(t.shape[0] for t in found if t.name.endswith("embeddings.patch_embedding.weight"))
    dtype = found[0].dtype
    for end, fill in (("weight", 1.0), ("bias", 0.0)):
        name = f"vision_tower.vision_model.post_layernorm.{end}"
        if name not in present:
            blocks = partial(_filled, width, fill, dtype)
            found.append(TensorToWrite(name=name, shape=(width,), dtype=dtype, blocks=blocks))
    return found


def _filled(width: int, value: float, dtype: torch.dtype) -> Iterable[torch.Tensor]:
    return [torch.full((width,), value, dtype=dtype)]


def _strategy(config: Config) -> str:
    """`default` leaves the first token out, which is CLIP's CLS."""
    return "default" if config.vision.vision == "clip" else "full"
