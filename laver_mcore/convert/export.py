"""A run's checkpoint as a Hugging Face directory: a text model, or the whole image-text model.

No architecture of transformers has LaVer's mixed attention and 2D positions, so the whole model goes with the
small files of `hub/` (remote code: `from_pretrained(DIR, trust_remote_code=True)`), its processor and chat
template. A run with neither of them may be what LLaVA is, which needs no code (`llava.py`).
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from laver_mcore.config.decoders import chat_templates
from laver_mcore.config.hugging_face import text_config
from laver_mcore.config.schema import Config
from laver_mcore.config.towers.spec import TowerSpec
from laver_mcore.convert import llava
from laver_mcore.convert.decoder import (
    carried_settings,
    copy_companions,
    export_decoder,
    open_run,
    run_tensors,
    written_whole,
)
from laver_mcore.convert.distributed_checkpoint import CheckpointReader
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.lora import write_adapter
from laver_mcore.convert.safetensors_directory import TensorToWrite, read_json, write_safetensors
from laver_mcore.convert.tokenizer_export import export_tokenizer
from laver_mcore.data.images.native import native_settings_of
from laver_mcore.data.images.processors import FixedImageProcessor
from laver_mcore.data.sequence.tokenizer import VISION_TOKENS, Tokenizer, load_tokenizer
from laver_mcore.megatron.checkpoints import check_tokenizer
from laver_mcore.model.vision_encoders import read_config, read_patch_size, read_sizes

Form = Literal["laver", "llava"]
HUB = Path(__file__).parent / "hub"
_CODE = ("configuration_laver.py", "modeling_laver.py", "processing_laver.py", "towers_laver.py")
_VISUAL = ("connector.", "vision_encoder.")


def export_run(
    load: str | Path,
    save: str | Path,
    *,
    dtype: torch.dtype | None = None,
    teacher: bool = False,
    decoder_only: bool = False,
    tokenizer: str | Path | None = None,
    adapter: bool = False,
    form: Form = "laver",
) -> list[str]:
    """Write a run's newest checkpoint; the whole image-text model where the run has a visual path.

    `teacher` takes the decoder's EMA weights (teacher and student share encoder and connector). `tokenizer`
    is the one to put beside, the run's own where not given. LoRA's adapters are merged; with `adapter` they are
    written by themselves, for `peft`. `form` is the architecture: ours with its own code, or transformers' LLaVA, where
    a run computes the same. Returns what it computes otherwise. Raises `ConfigError`, nothing written.
    """
    config, reader = open_run(load)
    if adapter:
        with written_whole(Path(save)) as folder:
            write_adapter(config, reader, folder, dtype=dtype, teacher=teacher)
        return []
    if tokenizer:
        _check_tokenizer(config, reader, tokenizer)
    if decoder_only or not config.vision.has_images:
        export_decoder(
            load, save, dtype=dtype, teacher=teacher, companions=tokenizer, beside=_tokenizer_of(config)
        )
        return []
    _check_supported(config)
    differs = llava.differences(config)
    if form == "llava" and differs:
        raise ConversionError(f"LLaVA has no {'; no '.join(differs)}: the run cannot be exported as it")
    vocab_size = reader.common["identity"]["vocab_size"]
    dtype = dtype or (torch.bfloat16 if config.train.bf16 else torch.float32)
    tensors = run_tensors(config, reader, vocab_size, dtype=dtype, teacher=teacher)
    visual = _visual_tensors(reader, dtype)
    tensors = llava.tensors_of(tensors, visual) if form == "llava" else tensors + visual
    source = tokenizer or config.data.tokenizer_model
    assert source is not None
    _check_tokenizer(config, reader, source)
    with written_whole(Path(save)) as folder:
        engine_tokenizer = export_tokenizer(
            source,
            folder,
            config.data.system_prompt,
            chat_templates(config.model.family, config.data.chat_template),
        )
        image_token = engine_tokenizer.special.image_pad
        if form == "llava":
            files = _llava_files(config, vocab_size, image_token, dtype, reader)
        else:
            files = _files(config, vocab_size, image_token, dtype)
        files["config.json"]["text_config"] |= carried_settings(Path(source))
        files["generation_config.json"] = _generation_config(engine_tokenizer)
        for name, content in files.items():
            _write_json(folder / name, content)
        for name in _CODE if form == "laver" else ():
            shutil.copyfile(HUB / name, folder / name)
        write_safetensors(folder, tensors)
    return differs


def _tokenizer_of(config: Config) -> Callable[[Path], object] | None:
    """Writes the tokenizer that a run trained with, as a directory or made into one."""
    source = config.data.tokenizer_model
    if source is None:
        return None
    if Path(source).is_dir():
        return partial(copy_companions, Path(source))
    templates = chat_templates(config.model.family, config.data.chat_template)
    return lambda folder: export_tokenizer(source, folder, config.data.system_prompt, templates)


def _files(config: Config, vocab_size: int, image_token: int, dtype: torch.dtype) -> dict[str, Any]:
    auto_map = {"AutoProcessor": "processing_laver.LaverProcessor"}
    return {
        "config.json": model_config(config, vocab_size, image_token, dtype),
        "preprocessor_config.json": processor_config(config),
        "processor_config.json": {"processor_class": "LaverProcessor", "auto_map": auto_map},
    }


def _llava_files(
    config: Config, vocab_size: int, image_token: int, dtype: torch.dtype, reader: CheckpointReader
) -> dict[str, Any]:
    assert config.vision.vision_path is not None
    tower = read_json(Path(config.vision.vision_path) / "preprocessor_config.json")
    return {
        "config.json": llava.model_config(config, vocab_size, image_token, dtype, reader),
        "preprocessor_config.json": tower | {"processor_class": "LlavaProcessor"},
        "processor_config.json": llava.processor_config(
            read_patch_size(config.vision.vision_path), config, VISION_TOKENS["image_pad"]
        ),
    }


def _check_tokenizer(config: Config, reader: CheckpointReader, source: str | Path) -> None:
    """Refuse a tokenizer of other content than the run was trained with."""
    if "tokenizer" not in reader.common:
        return
    found = load_tokenizer(source, *chat_templates(config.model.family, config.data.chat_template))
    check_tokenizer(reader.folder, reader.common, source, found.fingerprint())


def _check_supported(config: Config) -> None:
    vision = config.vision
    if vision.vision_select != "patch":
        raise ConversionError(f"vision_select={vision.vision_select} cannot be exported, only patch")


def _visual_tensors(reader: CheckpointReader, dtype: torch.dtype) -> list[TensorToWrite]:
    """Tower and connector under their own names; mask token and vision head serve training alone."""

    def read(key: str) -> list[torch.Tensor]:
        return [reader.read(key)]

    return [
        TensorToWrite(name=key, shape=reader.shape(key), dtype=dtype, blocks=partial(read, key))
        for key in reader
        if key.startswith(_VISUAL)
    ]


def _grid(config: Config) -> list[int] | None:
    """Rows and columns of visual tokens of every image; None where each has its own."""
    vision = config.vision
    if vision.is_encoder_free:
        return [vision.image_size // vision.patch_size] * 2
    if vision.is_native:
        return None
    assert vision.vision_path is not None
    processor = FixedImageProcessor(vision.vision_path, **read_sizes(vision.vision_path))
    return list(processor.grid(0, 0))


def model_config(config: Config, vocab_size: int, image_token_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of the exported config.json."""
    vision = config.vision
    assert config.model.mrope_section is not None
    tower: dict[str, Any] = {}
    if vision.tower is not None:
        assert vision.vision_path is not None
        settings = read_config(vision.vision_path, vision.vision)
        tower = dict(
            vision_config=settings, vision_layer=vision.vision_layer, tower=_tower(vision.tower, settings)
        )
    return {
        "model_type": "laver",
        "architectures": ["LaverForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_laver.LaverConfig",
            "AutoModelForImageTextToText": "modeling_laver.LaverForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_laver.LaverForConditionalGeneration",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "text_config": text_config(config.model, vocab_size),
        "tie_word_embeddings": not config.model.untie_embeddings_and_output_weights,
        "vision": vision.vision,
        **tower,
        "patch_size": vision.patch_size,
        "connector_hidden_size": vision.connector_hidden_size or config.model.hidden_size,
        "normalize_visual_tokens": bool(config.vision.normalize_visual_tokens),
        "image_grid": _grid(config),
        "image_token_id": image_token_id,
        "mrope_section": list(config.model.mrope_section),
        "mrope_split": config.model.mrope_split,
        "rope_2d": config.attention.rope_2d,
        "mixed_attention": config.attention.mixed_attention,
    }


def _tower(tower: TowerSpec, settings: dict[str, Any]) -> dict[str, Any]:
    """What the exported code (`hub/towers_laver.py`) has to know of a tower."""
    own: dict[str, Any] = dict(
        package=tower.package, model=tower.model, settings=tower.settings, native=tower.native
    )
    if tower.native is None:
        own |= dict(layers=tower.layers, final_norm=tower.final_norm, norms_last_state=tower.norms_last_state)
        own |= dict(prefix_tokens=tower.prefix_tokens(tower.filled(settings)))
    return own


def processor_config(config: Config) -> dict[str, Any]:
    """The content of the exported preprocessor_config.json."""
    vision = config.vision
    settings: dict[str, Any] = dict(image_size=vision.image_size, patch_size=vision.patch_size)
    if vision.tower is not None:
        assert vision.vision_path is not None
        settings = dict(tower=read_json(Path(vision.vision_path) / "preprocessor_config.json"))
        if vision.tower.native is not None:
            bounds = dict(min_pixels=vision.min_pixels, max_pixels=vision.max_pixels)
            settings = dict(tower=native_settings_of(vision.tower.native, vision.vision_path, **bounds))
    return {
        "image_processor_type": "LaverImageProcessor",
        "processor_class": "LaverProcessor",
        "auto_map": {
            "AutoImageProcessor": "processing_laver.LaverImageProcessor",
            "AutoProcessor": "processing_laver.LaverProcessor",
        },
        "image_grid": _grid(config),
        **settings,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    special = tokenizer.special
    return {
        "do_sample": False,
        "eos_token_id": special.end_of_turn,
        "pad_token_id": special.pad,
        "max_new_tokens": 256,
        "suppress_tokens": [special.image_pad],  # an image in an answer would have no pixels
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
