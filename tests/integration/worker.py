"""Run training scenarios one after another inside one torchrun: `worker.py SCENARIOS.json`.

Starting processes and importing torch takes longer than training a tiny model, so one launch serves many layouts.
"""

import gc
import json
import traceback
import warnings
from pathlib import Path

from laver_mcore.console import run_and_leave


def main(argv: list[str]) -> int:
    warnings.filterwarnings("ignore")
    import torch.distributed as dist
    from megatron.core import parallel_state

    from laver_mcore import parallel
    from laver_mcore.config.load import parse
    from laver_mcore.run import train_run

    device = parallel.init_distributed(timeout_minutes=2)

    def forget_groups() -> None:
        """Megatron leaves its groups behind, three threads each that wake up a hundred times a second."""
        for group in (parallel_state._global_process_group_list or [None])[1:]:
            dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
        gc.collect()

    for scenario in json.loads(Path(argv[0]).read_text()):
        config, _ = parse(scenario["argv"])
        try:
            train_run(config, device)
        except Exception:
            if not scenario["may_fail"]:
                raise
            if dist.get_rank() == 0:
                Path(scenario["error"]).write_text(traceback.format_exc())
        dist.barrier()
        forget_groups()
    return 0


if __name__ == "__main__":
    run_and_leave(main)
