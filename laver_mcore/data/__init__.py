"""Data: conversations with images on disk -> micro-batches, the same under every parallel layout.

    records/    JSON, parquet, shards      -> Sample        (key, turns, where the images lie)
    images/     encoded images             -> pixels, equal to the published processors'
    sequence/   turns + image grids        -> tokens, labels, positions, mask -> Batch
    order/      lengths, costs, seed       -> which samples stand in which row, which row on which rank
    serve/      a step                     -> list[Batch], read ahead, in processes, the same on all ranks
    prepare/    published corpora          -> prepared shards

docs/data.md says how to use it, and what was measured.
"""
