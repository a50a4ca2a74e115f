"""Every place that bends Megatron-Core, and nothing else.

jit.py                Megatron-Core imported without torch's compiler
cpu.py                "cuda" means "cpu" (or "meta") on a machine without CUDA
parallel.py           process groups -> Topology
optimizer.py          Megatron's optimizer, and where it keeps fp32 masters
weight_shards.py      which elements of a parameter a data-parallel rank keeps
checkpoint_folder.py  where checkpoints lie, and which is the newest
"""
