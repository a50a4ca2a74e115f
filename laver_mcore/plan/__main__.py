"""The planner's command line: `laver plan --config RECIPE --gpus 16 --gpu a100-80gb`.

Every other flag is the recipe's, as for `laver train` (--model qwen2.5-72b --global-batch-size 1024).
"""

import argparse
import json
import sys
from collections.abc import Sequence

from laver_mcore.accounting.devices import GIB, GPUS
from laver_mcore.accounting.tables import memory_table
from laver_mcore.accounting.typical import typical_mix
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser, file_to_write
from laver_mcore.config.load import parse
from laver_mcore.config.presets import model_name
from laver_mcore.config.schema import Config
from laver_mcore.plan import report
from laver_mcore.plan.search import Plan, search
from laver_mcore.plan.setting import Setting


def main(argv: Sequence[str]) -> int:
    """Plan and print. Returns the exit status: 0, or 2 for input that cannot be planned."""
    options = FlagParser(__doc__)
    options.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    options.add_argument("--gpu", choices=list(GPUS), required=True, help="kind of GPU")
    options.add_argument("--top", type=int, default=10, help="layouts to print (default 10)")
    options.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="also write every feasible layout here"
    )
    options.add_argument("--images-per-row", type=int, help="images in a packed row (default: 70 %% of it)")
    options.add_argument(
        "--supervised-share", type=float, default=0.29, help="of a row's tokens (default 0.29)"
    )
    options.add_argument("--matmul-efficiency", type=float, help="of the GPU's peak (default: by GPU)")
    chosen, rest = options.parse_known_args(list(argv))
    try:
        config, _ = parse([*rest, "--dry-run"])  # on paper: the weights need not be here
        setting = _setting(config, chosen)
    except ConfigError as error:
        print(f"{options.prog}: error: {error}", file=sys.stderr)
        return 2
    plan = search(config, setting)
    print("\n".join(lines(config, setting, plan, chosen.gpu, chosen.top)))
    if chosen.json:
        content = report.as_json(config, setting, plan.feasible, plan.refused)
        chosen.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


def _setting(config: Config, chosen: argparse.Namespace) -> Setting:
    if chosen.gpus < 1:
        raise ConfigError(f"gpus={chosen.gpus} must be at least 1")
    if config.model.vocab_size is None:
        raise ConfigError(f"model={config.model.model} has no vocabulary of its own; add --vocab-size")
    gpu = GPUS[chosen.gpu]
    return Setting(
        gpu=gpu,
        num_gpus=chosen.gpus,
        mix=typical_mix(config, chosen.images_per_row, chosen.supervised_share),
        vocab_size=config.model.vocab_size,
        matmul_efficiency=chosen.matmul_efficiency or gpu.matmul,
    )


def lines(config: Config, setting: Setting, plan: Plan, gpu: str, top: int) -> list[str]:
    """What the planner prints."""
    train = config.train
    found = [
        f"{model_name(config.model)} with {config.vision.vision}, objective {config.objective.name}: "
        f"{train.global_batch_size} rows x {config.data.seq_length} tokens on {setting.num_gpus} x {gpu}",
        *report.assumptions(setting),
        "",
    ]
    if plan.feasible:
        best = plan.feasible[0]
        found += [f"{len(plan.feasible)} layouts fit; predicted, the fastest first:"]
        found += report.ranking(plan.feasible[:top], config, setting)
        found += [
            "",
            f"flags of the first one: {report.flags(config, best.layout) or 'none, the recipe has it'}",
        ]
        found += ["", "GiB per rank of the first one:", *memory_table(best.memory), *report.time_table(best)]
    else:
        found += ["no layout fits"]
        if plan.smallest is not None:
            found += [f"the smallest needs {plan.smallest.peak_memory / GIB:.1f} GiB:"]
            found += memory_table(plan.smallest.memory)
    if plan.refused:
        found += ["", "left out:", *report.reasons(plan.refused)]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
