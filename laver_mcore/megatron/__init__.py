"""Every place that bends Megatron-Core, and nothing else.

jit.py                Megatron-Core imported without torch's compiler
cpu.py                "cuda" means "cpu" (or "meta") on a machine without CUDA
environment.py        variables: of torchrun, and for CUDA before torch is loaded
rendezvous.py         where ranks meet, after a restart as well
parallel.py           process groups -> Topology
known_shapes.py       lengths that stages need not exchange
optimizer.py          Megatron's optimizer, and where it keeps fp32 masters
optimizer_state.py    its state in checkpoints, each data-parallel rank with its part
versions.py           what differs between the versions of Megatron-Core that are supported
weight_shards.py      which elements of a parameter a data-parallel rank keeps
lazy.py               rows of a parameter that rest in steps without a gradient of theirs
segments.py           a stage's layers with looks in between
checkpoints.py        where checkpoints lie, and which are of one model
background.py         a copy of the process, at work beside training
publishing.py         a checkpoint on its way, and what it takes to be one
intact.py             checksums, and the newest checkpoint that is whole
unpickling.py         checkpoints read without running what stands in them
"""
