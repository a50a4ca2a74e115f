"""Prompt, tokenizer, layout, masks -> Batch.

tokenizer.py  one interface over Hugging Face and SentencePiece
prompt.py     turns + image grids -> EncodedSample (tokens, next-token labels, image spans)
layout.py     where every token stands and what it sees: 2D positions, mixed-attention intervals
masking.py    which visual tokens are hidden, from (seed, sample key, image, step)
batch.py      encoded samples -> Batch (one micro-batch, one sequence)
"""
