"""Data: conversations with images on disk -> micro-batches, the same under every parallel layout.

sources.py       JSON, parquet or shards     -> Sample           (key, turns, where the images lie)
records.py, finevision.py, image_source.py, shards.py   the formats themselves
index.py         samples                     -> SourceIndex      (lengths and image sizes, measured once)
dialogues.py     indices                     -> Dialogues        (all usable samples, numbered through)
cost.py          a dialogue's numbers        -> what it costs to train on
order.py         lengths, costs, seed        -> rows of at most seq_length tokens (packing.py, randomness.py)
steps.py         a step                      -> its rows, ranks and micro-batches even in cost (balance.py)
prompt.py        turns + image grids         -> EncodedSample    (tokens, labels, image spans; tokenizer.py)
image_backend.py encoded images              -> pixels or patches (decode.py, dali.py, gpu_backend.py, native.py)
assemble.py      reading and decoding as tasks, done here or in processes (workers.py)
ahead.py         tasks of the steps to come  -> list[Batch]      (quarantine.py, device_copy.py)
batch.py         encoded samples             -> Batch            (one micro-batch, one sequence; layout.py)
exchange.py      one rank reads for a model replica, and all agree on what failed
loader.py        all of it, step by step
masking.py       which visual tokens are hidden, from (seed, sample key, image, step)
prepare/         published corpora           -> prepared shards

docs/data.md says how to use it, and what was measured.
"""
