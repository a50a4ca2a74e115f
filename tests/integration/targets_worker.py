"""Run one training step of each scenario and keep what student and teacher put out: `targets_worker.py SCENARIOS.json`.

The rank with the losses writes DIRECTORY/NAME.pt: [N, K] of all micro-batches, and the losses.
"""

import json
import sys
import warnings
from pathlib import Path


def main(path: str) -> None:
    warnings.filterwarnings("ignore")
    import torch

    from laver_mcore.megatron import parallel

    device = parallel.init_distributed(timeout_minutes=2)
    for scenario in json.loads(Path(path).read_text()):
        found = one_step(scenario["argv"], device)
        if found is not None:
            torch.save(found, Path(path).parent / f"{scenario['name']}.pt")
    parallel.shut_down()


def one_step(argv: list[str], device) -> dict | None:
    import torch
    from accounting_worker import first_step

    from laver_mcore.model.method import ModelOutput
    from laver_mcore.train.step import train_step

    engine, batches = first_step(argv, device)
    seen: list[tuple[ModelOutput, torch.Tensor]] = []

    def keep(module, _, output):
        seen.append((output, module.vision_head(output.images_ND).detach()))  # before the step moves the head

    if engine.topology.is_last_rank:
        engine.chunks[-1].register_forward_hook(keep)
    result = train_step(engine, batches, engine.config.train.train_iters - 1)
    if not engine.topology.is_last_rank:
        return None
    return dict(
        teacher=torch.cat([o.target_NK for o, _ in seen if o.target_NK is not None]),
        student=torch.cat([student for _, student in seen]),
        losses=result.losses,
        grad_norm=result.grad_norm,
    )


if __name__ == "__main__":
    main(sys.argv[1])
