"""Data: conversations with images on disk -> micro-batches, the same under every parallel layout.

records.py   JSON / JSONL + image folder  -> Sample           (key, turns, image paths)
tokenizer.py Hugging Face / SentencePiece -> Tokenizer
prompt.py    turns + image grids          -> EncodedSample    (tokens, next-token labels, image spans)
packing.py   sample lengths               -> rows of at most seq_length tokens
layout.py    documents of text and images -> SequenceLayout   (2D positions, mixed-attention intervals)
images.py    image files                  -> pixels or patches
batch.py     encoded samples              -> Batch            (one micro-batch, one sequence)
loader.py    all of it, step by step      -> list[Batch]
masking.py   which visual tokens are hidden, from (seed, sample key, image, step)
"""
