# GPU machines: NVIDIA's PyTorch container plus this repository.
#
#   docker build -t laver_mcore .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -it -v "$PWD/data:/workspace/laver_mcore/data" laver_mcore
#
# The tag pins torch (2.12), CUDA (13.2), transformer-engine, apex, DALI and Triton, built for one another: they stay
# as they are. Never install `apex` by name with pip: that is another project.
FROM nvcr.io/nvidia/pytorch:26.05-py3

WORKDIR /workspace/laver_mcore

# The container constrains what it was built with (/etc/pip/constraint.txt). Of our pins, those that it has too give
# way; the others are installed exactly and without their own dependencies, which are pinned beside them.
COPY requirements requirements
RUN python - <<'PYTHON' && pip install --no-cache-dir --no-deps -r /tmp/pins.txt
import re
from importlib.metadata import distributions
from pathlib import Path


def names(text):
    return {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([A-Za-z0-9._-]+)", text, re.M)}


present = names("\n".join(dist.metadata["Name"] or "" for dist in distributions()))
# Ours decides these, whatever the container has: the engine is written against them, the image path pixel by pixel.
ours = {"megatron-core", "transformers", "tokenizers", "huggingface-hub", "pillow", "tyro", "pydantic", "pydantic-core"}
lines = Path("requirements/base.txt").read_text().splitlines()
kept = [line for line in lines if line and line[0] != "#" and names(line) - (present - ours)]
Path("/tmp/pins.txt").write_text("\n".join(kept) + "\n")
Path("/etc/pip/constraint.txt").write_text("")
PYTHON

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# A build machine has no driver; the container's compatibility library stands in for libcuda.so.
RUN LD_LIBRARY_PATH="/usr/local/cuda/compat/lib.real:/usr/local/cuda/compat/lib:/usr/local/cuda/compat:${LD_LIBRARY_PATH:-}" \
    python - <<'PYTHON'
from importlib.metadata import version

import apex.optimizers
import megatron.core
import nvidia.dali
import torch
import transformer_engine.pytorch
import transformers
import triton

import laver_kernels
import laver_mcore.train.build

assert torch.version.cuda, "torch was replaced by a build without CUDA"
assert megatron.core.__version__ == "0.16.1", megatron.core.__version__
for name, module in (("torch", torch), ("triton", triton), ("transformers", transformers), ("dali", nvidia.dali)):
    print(name, module.__version__)
print("transformer-engine", version("transformer-engine"))
PYTHON
RUN python pretrain_laver.py --help >/dev/null
