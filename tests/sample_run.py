"""A small training set on disk and recipes over it: what the integration tests train on."""

import json
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|endoftext|>",
    "\n",
)
WORDS = ["red", "green", "blue", "dark", "bright", "left", "right", "up", "down"]
WORDS += ["one", "two", "three", "many", "few"]
IMAGE_SIZE, PATCH_SIZE = 32, 8  # 4 x 4 visual tokens an image


def write_tokenizer(path: Path, sentences: list[str]) -> None:
    """A SentencePiece model with Qwen's special tokens, trained on `sentences`."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=96,
            hard_vocab_limit=False,
            model_type="bpe",
            user_defined_symbols=list(SPECIAL),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )


def write_sample_data(directory: Path, num_samples: int = 48) -> Path:
    """LLaVA JSON with images, tokenizer beside it: dialogues with no, one and two images."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    records = []
    for index in range(num_samples):
        num_images = (1, 2, 0, 1)[index % 4]
        names = []
        for image in range(num_images):
            pixels = generator.integers(0, 255, (5, 5, 3), dtype=np.uint8)
            name = f"{index:03d}_{image}.png"
            Image.fromarray(pixels).resize((40, 40)).save(directory / name)
            names.append(name)
        question = "<image>\n" * num_images + " ".join(generator.choice(WORDS, 3 + index % 5))
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": " ".join(generator.choice(WORDS, 4))},
        ]
        record: dict = {"id": f"sample-{index:03d}", "conversations": turns}
        if names:
            record["image"] = names if len(names) > 1 else names[0]
        records.append(record)
    (directory / "train.json").write_text(json.dumps(records), encoding="utf-8")
    write_tokenizer(directory / "tokenizer.model", [" ".join(WORDS)] * 10 + ["You are a helpful assistant."])
    return directory / "train.json"


def _write_text_rows(directory: Path) -> None:
    """Rows without any image beside rows with one: a rank may see no image while others do."""
    records = json.loads((directory / "train.json").read_text(encoding="utf-8"))
    words = WORDS * 3
    texts = [
        {
            "id": f"text-{index}",
            "conversations": [
                {"from": "human", "value": " ".join(words[index:])},
                {"from": "gpt", "value": " ".join(words[index : index + 6])},
            ],
        }
        for index in range(12)
    ]
    with_image = [record for record in records if "image" in record][:8]
    (directory / "text_rows.json").write_text(json.dumps(texts + with_image), encoding="utf-8")


def write_recipe(directory: Path) -> Path:
    """A LaVer recipe over the sample data, tiny, with every part of the method switched on."""
    _write_text_rows(directory)
    recipe = f"""
model: {{model: tiny, num_layers: 4, hidden_size: 64, ffn_hidden_size: 128}}
vision: {{vision: encoder-free, image_size: {IMAGE_SIZE}, patch_size: {PATCH_SIZE}}}
objective: laver
laver:
  mask_ratio: 0.5
  mask_strategy: constant
  momentum: 0.9
  ema_steps: 1
  vision_head_hidden_size: 64
  centering: true
data:
  data_path: [{directory}/train.json]
  tokenizer_model: {directory}/tokenizer.model
  seq_length: 128
  pad_to_multiple: 16
  system_prompt: ""
optimizer: {{lr: 1.0e-3}}
train: {{train_iters: 8, micro_batch_size: 1, global_batch_size: 4}}
"""
    path = directory / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    return path
