"""Take steps on a pretended accelerator: `device_worker.py FOLDER NAME ARGUMENTS [NAME ARGUMENTS ...]`.

Its tensors are fake: they have shapes, types and a device, and torch refuses operations that mix them with host
tensors, as CUDA would. Prints one JSON object: for every name the devices of a step's results, or the error.
"""

import contextlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
DEVICE_NAME = f"{NAME}:0"
TYPES = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


class Bridges(TorchFunctionMode):
    """What fake tensors cannot do by themselves: names of CUDA types, and copies from known host tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return TYPES[args[0].dtype]
        devices = [kwargs.get("device"), *(a for a in args[1:] if isinstance(a, str | torch.device))]
        goes = any(str(device).startswith(("cuda", NAME)) for device in devices)
        if func is torch.tensor and goes:
            source = torch.tensor(*args, **{**kwargs, "device": "cpu"})
            return torch.empty(source.shape, dtype=source.dtype, device=DEVICE_NAME)
        if func is torch.Tensor.to and goes and args[0].device.type == "cpu":
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=DEVICE_NAME)
        return func(*args, **kwargs)


@contextlib.contextmanager
def collectives_of_one():
    """Groups and collectives of a world of one rank, which fake tensors need no library for."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    new_group = dist.new_group

    def done(*_, **__):
        return types.SimpleNamespace(wait=lambda: None)

    def all_gather_object(found, value, group=None):
        found[:] = [value] * len(found)

    changes = [(dist, name, done) for name in COLLECTIVES]
    changes += [(buffers, name, done) for name in ("dist_all_gather_func", "dist_reduce_scatter_func")]
    changes += [
        (buffers, "_coalescing_manager", lambda *_, **__: contextlib.nullcontext(done())),
        (dist, "all_gather_object", all_gather_object),
        (dist, "new_group", lambda *a, **k: new_group(*a, **{**k, "backend": "fake"})),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in changes:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def step(argv: list[str], device: torch.device) -> list[str]:
    """Devices of what one step returns, after another that made the optimizer's state."""
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train import build
    from laver_mcore.train.step import train_step

    config, _ = parse(argv)
    tokenizer = build.build_tokenizer(config)
    data = build.build_data(config, tokenizer)
    sizes = {name: getattr(config.train, name) for name in ("global_batch_size", "micro_batch_size")}
    steps = list(data.iterate(0, 2, dp_rank=0, dp_size=1, image_share=(0, 1), **sizes))
    topology = parallel.build_topology(config.parallel, device)
    with FakeTensorMode(allow_non_fake_inputs=True), Bridges():
        engine, _ = build.build_engine(config, topology, build.resolve_vocab_size(config, tokenizer))
        for iteration, batches in enumerate(steps):
            result = train_step(engine, batches, iteration)
    distance = result.teacher_move and result.teacher_move.distance
    found = (result.losses, result.counts, result.grad_norm, result.applied, distance)
    return [str(tensor.device) for tensor in found if tensor is not None]


def main(folder: Path, named: list[tuple[str, str]]) -> None:
    from laver_mcore.megatron import cpu
    from laver_mcore.train import build

    _setup_privateuseone_for_python_backend(rename=NAME)
    module = getattr(torch, NAME, None) or types.ModuleType(NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    if not hasattr(torch, NAME):
        torch._register_device_module(NAME, module)
    cpu.install(DEVICE_NAME)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    answers = {}
    for name, flags in named:
        argv = f"--config {folder}/recipe.yaml --num-layers 2 --kernels triton {flags}".split()
        spoiled = contextlib.nullcontext()
        if name == "spoiled":
            spoiled = mock.patch("laver_mcore.train.step.send", lambda tensor, device: tensor)
        with (
            collectives_of_one(),
            spoiled,
            mock.patch.object(build, "with_kernels", lambda config, _: config),
        ):
            try:
                answers[name] = step(argv, torch.device(NAME, 0))
            except RuntimeError as error:
                answers[name] = str(error)
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(zip(sys.argv[2::2], sys.argv[3::2], strict=True)))
