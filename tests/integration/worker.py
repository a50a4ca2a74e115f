"""Run training scenarios one after another inside one torchrun: `worker.py SCENARIOS.json`.

Starting processes and importing torch takes longer than training a tiny model, so one launch serves many layouts.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path


def main(path: str) -> None:
    warnings.filterwarnings("ignore")
    import torch.distributed as dist

    from laver_mcore import parallel
    from laver_mcore.config.load import parse
    from laver_mcore.run import train_run

    device = parallel.init_distributed(timeout_minutes=2)
    for scenario in json.loads(Path(path).read_text()):
        config, _ = parse(scenario["argv"])
        try:
            train_run(config, device)
        except Exception:
            if not scenario["may_fail"]:
                raise
            if dist.get_rank() == 0:
                Path(scenario["error"]).write_text(traceback.format_exc())
        dist.barrier()
    parallel.shut_down()


if __name__ == "__main__":
    main(sys.argv[1])
