"""Build engines, run one step of each, and write down what was really there: `accounting_worker.py SCENARIOS.json`.

Every rank writes `NAME.RANK.json`: matrix products as torch's FlopCounterMode counts them, the step's counts, the
parameters, and the bytes of the tensors that stay.
"""

import json
import sys
import warnings
from pathlib import Path


def main(path: str) -> None:
    warnings.filterwarnings("ignore")
    import torch.distributed as dist

    from laver_mcore.megatron import parallel

    device = parallel.init_distributed(timeout_minutes=2)
    for scenario in json.loads(Path(path).read_text()):
        if scenario.get("save_like_the_kernels"):
            save_like_the_kernels()
        found = observe(scenario["argv"], device)
        (Path(path).parent / f"{scenario['name']}.{dist.get_rank()}.json").write_text(json.dumps(found))
    parallel.shut_down()


def first_step(argv: list[str], device) -> tuple:
    """The engine of a recipe, and the micro-batches of its first step."""
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import build_data, build_engine, build_tokenizer, resolve_vocab_size

    config, _ = parse(argv)
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer)
    vocab_size = resolve_vocab_size(config, tokenizer)
    topology = parallel.build_topology(config.parallel, device)
    engine, _ = build_engine(config, topology, vocab_size)
    steps = data.iterate(
        0,
        1,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        image_share=(topology.share, topology.num_shares) if topology.on_first_stage else None,
    )
    batches = next(steps)
    steps.close()
    return engine, batches


def observe(argv: list[str], device) -> dict:
    from torch.utils.flop_counter import FlopCounterMode

    from laver_mcore.model.parameters import named_parameters
    from laver_mcore.train.step import train_step

    engine, batches = first_step(argv, device)
    config, topology = engine.config, engine.topology
    saved = SavedBytes(engine)
    with FlopCounterMode(display=False) as counter:
        result = train_step(engine, batches, config.train.train_iters - 1)
    flops: dict[str, int] = {}
    for op, number in counter.get_flop_counts()["Global"].items():
        flops[str(op).removeprefix("aten.")] = flops.get(str(op), 0) + number
    masks = [
        [int(b.layout.intervals.row_hi_T.sub(b.layout.intervals.row_lo_T).clamp(min=0).sum()), b.image_grids]
        for b in batches
    ]
    return dict(
        vocab_size=engine.vocab_size,
        flops=flops,
        counts=dict(zip(result.terms, result.counts.tolist(), strict=True)),
        work=result.work.tolist(),
        masks=masks,
        parameters=[
            [item.name, list(item.parameter.shape), item.parameter.requires_grad, item.owned, item.sharded]
            for item in named_parameters(engine.chunks, topology)
        ],
        bytes=tensor_bytes(engine),
        saved=saved.bytes,
    )


class SavedBytes:
    """Bytes that the decoder layers of this rank save for the backward of its first micro-batch."""

    def __init__(self, engine) -> None:
        self.bytes = 0
        parameters = {p.untyped_storage().data_ptr() for chunk in engine.chunks for p in chunk.parameters()}
        for chunk in engine.chunks if not engine.objective.taps else ():  # blocks that run whole
            chunk.decoder.forward = self._watched(chunk.decoder.forward, parameters)

    def _watched(self, forward, parameters):
        import torch

        seen: dict[int, object] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
                self.bytes += storage.nbytes()
            return tensor

        def watched(*args, **kwargs):
            if not torch.is_grad_enabled() or seen:
                return forward(*args, **kwargs)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*args, **kwargs)

        return watched


def save_like_the_kernels() -> None:
    """Put in the place of attention something that saves what the Triton kernels save."""
    import torch

    from laver_mcore.model import mixed_attention

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2])
            ctx.save_for_backward(out, lse, q.clone(), k.clone(), v)
            return out

        @staticmethod
        def backward(ctx, grad):
            _, _, q, k, v = ctx.saved_tensors
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    mixed_attention.mixed_attention = lambda q, k, v, *_, **__: Attention.apply(q, k, v)


def tensor_bytes(engine) -> dict[str, int]:
    """Bytes on this rank of weights, gradients, optimizer state and teacher, every storage counted once."""
    import torch

    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    weights = {p.data_ptr() for p in parameters}
    optimizer: dict[int, int] = {}
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner = getattr(part, "optimizer", None)
        for group in inner.param_groups if inner is not None else ():
            for parameter in group["params"]:
                state = inner.state.get(parameter, {})
                tensors = [parameter, *(v for v in state.values() if isinstance(v, torch.Tensor) and v.dim())]
                optimizer.update({t.data_ptr(): t.nbytes for t in tensors if t.data_ptr() not in weights})
    return dict(
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.main_grad.nbytes for p in parameters if p.requires_grad),
        optimizer=sum(optimizer.values()),
        teacher=0 if engine.teacher is None else engine.teacher.num_bytes,
    )


if __name__ == "__main__":
    main(sys.argv[1])
