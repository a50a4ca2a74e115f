"""Tiny tokenizers and a dataset on disk, built without a network."""

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from laver_mcore.config.decoders.templates import CHATML
from laver_mcore.data.sequence.tokenizer import VISION_TOKENS, load_tokenizer

CORPUS = [f"which digits are in row {i}? They are {i * 7 % 10}, {i * 3 % 10} and {i}." for i in range(60)]

SPECIAL = ("<|im_start|>", "<|im_end|>", *VISION_TOKENS.values())

# Qwen2.5's chat template, tools left out.
QWEN_TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501


def _build_hugging_face(folder, special=SPECIAL):
    """A byte-level BPE tokenizer in a directory, with Qwen's template."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", *special],
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN_TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder


def _build_sentencepiece(folder, special=SPECIAL):
    """A SentencePiece model that keeps newlines."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tiny"),
        vocab_size=90,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*special, "\n"],
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.fixture(scope="session")
def builders():
    """Functions (folder, special tokens) -> path of a tokenizer."""
    return {"hugging_face": _build_hugging_face, "sentencepiece": _build_sentencepiece}


@pytest.fixture(scope="session")
def hugging_face_path(tmp_path_factory):
    return _build_hugging_face(tmp_path_factory.mktemp("hugging_face"))


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory):
    return _build_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def hugging_face(hugging_face_path):
    return load_tokenizer(hugging_face_path, CHATML)


@pytest.fixture(scope="session", params=["hugging_face", "sentencepiece"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(f"{request.param}_path"), CHATML)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder with train.json: 40 samples with 0, 1 or 2 images of 16 x 16 pixels, of many lengths."""
    folder = tmp_path_factory.mktemp("dataset")
    draw = np.random.default_rng(0)
    records = []
    for index in range(40):
        names = [f"{index}_{i}.png" for i in range(index % 3)]
        for name in names:
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        question = "<image>\n" * len(names) + "which digits are in row 2?"
        answer = "They are 1, 2 and 3. " * (1 + index * index % 11)
        record = {
            "id": f"sample{index}",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        if names:
            record["image"] = names if len(names) > 1 else names[0]
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder
