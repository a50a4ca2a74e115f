"""Data: conversations with images on disk -> micro-batches, the same under every parallel layout.

sources.py       JSON, parquet or shards     -> Sample           (key, turns, where the images lie)
records.py, finevision.py, image_source.py, shards.py   the formats themselves
index.py         samples                     -> SourceIndex      (lengths and image sizes, measured once)
dialogues.py     indices                     -> Dialogues        (all usable samples, numbered through)
order.py         lengths, weights, seed      -> rows of at most seq_length tokens (packing.py, randomness.py)
prompt.py        turns + image grids         -> EncodedSample    (tokens, labels, image spans; tokenizer.py)
image_backend.py encoded images              -> pixels or patches (decode.py, dali.py, images.py, native.py)
steps.py         a step's rows               -> list[Batch]      (assemble.py, workers.py, quarantine.py)
batch.py         encoded samples             -> Batch            (one micro-batch, one sequence; layout.py)
loader.py        all of it, step by step; agreement.py lets the ranks of a model replica agree on failures
masking.py       which visual tokens are hidden, from (seed, sample key, image, step)
prepare/         published corpora           -> prepared shards

docs/data.md says how to use it, and what was measured.
"""
