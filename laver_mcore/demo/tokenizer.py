"""A SentencePiece tokenizer for the demo's few phrases, exact in both directions.

Normalisation is the identity and there is no dummy prefix, so `decode(encode(text)) == text` for every text
(characters outside the phrases fall back to byte tokens). A piece may span several words, which keeps a
question at about four tokens; a digit is always a token of its own, and so are Qwen's chat marks and the
newline.
"""

import io
from collections.abc import Iterable
from pathlib import Path

CHAT_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|endoftext|>",
)
ROLES = ("system", "user", "assistant")
VOCAB_SIZE = 384


def train_tokenizer(texts: Iterable[str], path: Path) -> int:
    """Train on `texts`, write the model to `path` and return its vocabulary size."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        user_defined_symbols=[*CHAT_MARKS, "\n", *ROLES, *"0123456789"],
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_digits=True,
        max_sentencepiece_length=40,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size())
