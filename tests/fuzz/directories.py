"""Readers of Hugging Face directories: tokenizers, decoders' and towers' configs and weights."""

import json
import shutil
from pathlib import Path
from random import Random

import transformers
from fuzz.mutations import bytes_of, text_of
from fuzz.readers import REFUSED, Draw, one_line
from sample_run import WORDS, write_tokenizer
from sample_tokenizers import KINDS, write_tokenizer_of

from laver_mcore.config.hugging_face import read_shape
from laver_mcore.data.sequence.tokenizer import load_tokenizer
from laver_mcore.model.vision_encoders import build_vision_encoder, read_sizes

QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu"}  # fmt: skip
LLAMA = QWEN | {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip


def hf_config(folder: Path) -> Draw:
    def draw(random: Random) -> None:
        (folder / "config.json").write_bytes(text_of(random, random.choice((QWEN, LLAMA))))
        try:
            read_shape(folder)
        except REFUSED as error:
            one_line(error)

    return draw


def sentencepiece(folder: Path) -> Draw:
    write_tokenizer(folder / "whole.model", [" ".join(WORDS)] * 10)
    whole = (folder / "whole.model").read_bytes()

    def draw(random: Random) -> None:
        (folder / "t.model").write_bytes(bytes_of(random, whole))
        try:
            load_tokenizer(folder / "t.model").encode("red green")
        except REFUSED as error:
            one_line(error)

    return draw


def tokenizer_json(folder: Path) -> Draw:
    whole, damaged = folder / "whole", folder / "damaged"
    write_tokenizer_of(whole, KINDS[0])
    files = [file.name for file in whole.iterdir() if file.suffix == ".json"]

    def draw(random: Random) -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(whole, damaged)
        name = random.choice(files)
        (damaged / name).write_bytes(text_of(random, json.loads((whole / name).read_text(encoding="utf-8"))))
        try:
            load_tokenizer(damaged).encode("red green")
        except REFUSED as error:
            one_line(error)

    return draw


def tower(folder: Path) -> Draw:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    config = transformers.SiglipVisionConfig(**sizes, intermediate_size=24)
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    weights, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    whole = weights.read_bytes()

    def draw(random: Random) -> None:
        of_weights = random.random() < 0.5
        weights.write_bytes(bytes_of(random, whole) if of_weights else whole)
        text = json.dumps(settings).encode() if of_weights else text_of(random, settings)
        (folder / "config.json").write_bytes(text)
        try:
            read_sizes(folder)
            for parameter in build_vision_encoder("siglip", path=folder).parameters():
                assert parameter.isfinite().all()
        except REFUSED as error:
            one_line(error)

    return draw
