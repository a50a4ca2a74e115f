"""Lengths, permutation, packing, balance: a pure function of (seed, step).

index.py      samples -> SourceIndex (lengths and image sizes, measured once)
dialogues.py  indices -> Dialogues (all usable samples, numbered through)
cost.py       a dialogue's numbers -> what it costs to train on
packing.py    samples of many lengths -> rows of one length
rows.py       which samples stand in which row of the endless concatenation of epochs
balance.py    rows -> data-parallel ranks and micro-batches, images -> tensor-parallel ranks
"""
