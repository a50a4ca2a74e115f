"""An independent training step in plain PyTorch and fp64, written from the published formulas.

    decoder.py     Qwen2's forward with a dense mask and 2D rotary positions (transformers and arXiv 2409.12191)
    sequence.py    documents, masks and positions, token by token (LaVer, arXiv 2512.06281)
    losses.py      next-token, MIM and Gram losses, and the likeness of visual tokens
    optimizer.py   AdamW (arXiv 1711.05101), clipping, learning-rate schedule
    laver.py       one step of LaVer from micro-batches to weights, averages and centre

It shares no code with the engine: batches, mask draws and starting weights are taken as given, everything else is
computed anew. A new method adds a term to the losses, a teacher, or a group of parameters here.

Shapes: S rows of a sequence, N visual tokens, D width, H query heads, G key/value heads, C channels of a head, V
vocabulary.
"""
