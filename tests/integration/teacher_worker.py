"""Train with a second, plain average beside the teacher: `teacher_worker.py DIRECTORY SCENARIOS.json`.

Every rank keeps an fp64 average of its model shard's whole weights, moved by the formula after every step, and writes
what its teacher holds and how far the two are apart as DIRECTORY/NAME.RANK.json.
"""

import json
import sys
import warnings
from pathlib import Path


class PlainAverage:
    """The formula itself, on whole weights, wrapped around the training step."""

    def __init__(self, train_step) -> None:
        self._train_step = train_step
        self.averages: dict = {}
        self.names: dict = {}

    def __call__(self, engine, batches, iteration, *timers):
        from laver_mcore.model.parameters import named_parameters

        if not self.averages:
            averaged = engine.config.objective.teacher(engine.config).averaged
            items = named_parameters(engine.chunks, engine.topology)
            self.names = {i.parameter: i.name for i in items if i.name.startswith(averaged)}
            self.averages = {p: p.detach().double().clone() for p in self.names}
        result = self._train_step(engine, batches, iteration, *timers)
        for parameter, average in self.averages.items():
            average.lerp_(parameter.detach().double(), 1.0 - result.teacher_move.momentum)
        return result

    def report(self, engine) -> dict:
        """How far the teacher's averages are from these, and what they take."""
        teacher = engine.teacher
        wholes = teacher.whole_averages(set(self.averages))
        apart = {
            self.names[p]: ((wholes[p].double() - average).norm() / average.norm().clamp(min=1e-12)).item()
            for p, average in self.averages.items()
        }
        return {
            "apart": apart,
            "averaged": sum(p.numel() for p in teacher.parameters),
            "average_bytes": sum(average.nbytes for average in teacher.averages.values()),
            "num_bytes": teacher.num_bytes,
        }


def main(directory: str, scenarios: str) -> None:
    warnings.filterwarnings("ignore")
    import torch.distributed as dist

    from laver_mcore.cli.run import train_run
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train import loop

    device = parallel.init_distributed(timeout_minutes=2)
    train_step = loop.train_step
    for name, argv in json.loads(Path(scenarios).read_text()).items():
        config, _ = parse(argv)
        loop.train_step = plain = PlainAverage(train_step)
        engine = train_run(config, device)
        path = Path(directory) / f"{name}.{dist.get_rank()}.json"
        path.write_text(json.dumps(plain.report(engine)))
        dist.barrier()
    parallel.shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
