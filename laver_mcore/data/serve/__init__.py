"""A step's samples -> list[Batch], read ahead, in processes, the same on all ranks.

steps.py          a step -> its rows, ranks and micro-batches
assemble.py       reading and decoding as tasks, done here or in processes (workers.py)
ahead.py          tasks of the steps to come -> list[Batch] (device_copies.py)
exchange.py       one rank reads for a model replica, and all agree on what failed
quarantine.py     samples that could not be used
loader.py         all of it, step by step
"""
