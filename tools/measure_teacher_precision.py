"""What the precision of the teacher's forward does to its targets: fp32, bf16, and bf16 with fp8 matrix products.

    python tools/measure_teacher_precision.py --config RECIPE.yaml --pretrained-checkpoint runs/stage2 --micro-batches 8

Each arm builds the recipe's model and its teacher anew, with the same weights, on the same micro-batches; losses are
those of the fp32 arm's student against each arm's targets. One process; further arguments are those of
pretrain_laver.py. docs/engine.md says what was found.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laver_mcore.config.checks import check_world
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.flags import FlagParser
from laver_mcore.config.load import parse
from laver_mcore.config.schema import Config
from laver_mcore.data.errors import DataError
from laver_mcore.data.sequence.batch import Batch
from laver_mcore.megatron import parallel
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.inputs import model_inputs
from laver_mcore.objectives.gram import gram_sum
from laver_mcore.objectives.latent import latent_sum
from laver_mcore.objectives.laver import LaverConfig
from laver_mcore.train.build import build_data, build_engine, build_tokenizer, resolve_vocab_size
from laver_mcore.train.counts import student_rows, without_tails

ARMS = {"fp32": "--no-bf16", "bf16": "--bf16", "fp8": "--bf16 --teacher-precision fp8"}
"""Name -> flags."""
COMPARED = (("bf16", "fp32"), ("fp8", "fp32"), ("fp8", "bf16"))
COLUMNS = ("relative error", "cosine", "KL", "moved", "same first")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one arm computed from one micro-batch of N visual tokens, in fp32."""

    student_NK: torch.Tensor
    targets_NK: torch.Tensor
    masked_rows_M: torch.Tensor
    image_lengths: tuple[int, ...]


def see(config: Config, topology: Topology, vocab_size: int, batches: Sequence[Batch]) -> list[Seen]:
    """Student and teacher of the recipe on each micro-batch, with masks of the end of their schedule."""
    engine, _ = build_engine(config, topology, vocab_size)
    assert engine.teacher is not None
    iteration = config.train.train_iters - 1
    batches = without_tails(batches, engine)
    found = []
    for batch, num_rows in zip(batches, student_rows(batches, engine), strict=True):
        plan = engine.objective.plan(batch, iteration)
        inputs = model_inputs(
            batch,
            num_rows,
            reconstruct=True,
            geometry=engine.geometry,
            num_shares=1,
            device=topology.device,
        )
        with torch.no_grad():
            output = engine.chunks[0](inputs, engine.objective, plan)
            if output.target_NK is None:
                continue  # no images
            student_NK = engine.chunks[0].vision_head(output.images_ND)
        found.append(
            Seen(
                student_NK=student_NK.float(),
                targets_NK=output.target_NK.float(),
                masked_rows_M=plan.masked_rows_M,
                image_lengths=batch.image_lengths,
            )
        )
    return found


def compare(got_NK: torch.Tensor, wanted_NK: torch.Tensor, temperature: float) -> tuple[float, ...]:
    """`COLUMNS`: |got - wanted| / |wanted|; mean cosine; means over tokens of KL(wanted || got), of the probability
    that is elsewhere (total variation), and of whether the largest entry is the same."""
    got, wanted = got_NK.double(), wanted_NK.double()
    log_got, log_wanted = (torch.log_softmax(z / temperature, -1) for z in (got, wanted))
    values = (
        (got - wanted).norm() / wanted.norm(),
        torch.nn.functional.cosine_similarity(got, wanted).mean(),
        (log_wanted.exp() * (log_wanted - log_got)).sum(-1).mean(),
        (log_wanted.exp() - log_got.exp()).abs().sum(-1).mean() / 2,
        (got.argmax(-1) == wanted.argmax(-1)).double().mean(),
    )
    return tuple(float(value) for value in values)


def settings(config: Config) -> LaverConfig:
    """The recipe's section of the objective."""
    assert isinstance(config.objective, LaverConfig)
    return config.objective


def losses(config: Config, students: Sequence[Seen], teachers: Sequence[Seen]) -> tuple[float, float]:
    """(mim_loss, gram_loss) of these students against these teachers' targets, over all micro-batches."""
    laver, mim, gram = settings(config), 0.0, 0.0
    for student, teacher in zip(students, teachers, strict=True):
        mim += latent_sum(
            student.student_NK,
            teacher.targets_NK,
            student.masked_rows_M,
            center_K=None,
            student_temperature=laver.student_temperature,
            teacher_temperature=laver.teacher_temperature,
        ).item()
        gram += gram_sum(
            student.student_NK, teacher.targets_NK, student.image_lengths, gram="cga", gram_scope="image"
        ).item()
    masked = sum(len(student.masked_rows_M) for student in students)
    return mim / max(1, masked), gram / sum(len(student.image_lengths) for student in students)


def report(config: Config, seen: dict[str, list[Seen]]) -> str:
    """Two tables: targets against targets, and the losses that follow."""
    targets = {arm: torch.cat([each.targets_NK for each in found]) for arm, found in seen.items()}
    temperature = settings(config).teacher_temperature
    p_NK = torch.softmax(targets["fp32"].double() / temperature, -1)
    entropy = float(torch.special.entr(p_NK).sum(-1).mean())
    lines = [
        f"{len(p_NK)} visual tokens of width {p_NK.shape[1]}, teacher temperature {temperature}, "
        f"mean entropy {entropy:.3f}, mean largest probability {float(p_NK.amax(-1).mean()):.3f}",
        f"{'targets':14}" + "".join(f"{name:>15}" for name in COLUMNS),
    ]
    for got, wanted in COMPARED:
        values = compare(targets[got], targets[wanted], temperature)
        lines.append(f"{got + ' / ' + wanted:14}" + "".join(f"{value:15.5f}" for value in values))
    lines.append(f"{'losses':14}{'mim_loss':>15}{'gram_loss':>15}")
    for arm, found in seen.items():
        lines.append(f"{arm:14}" + "".join(f"{loss:15.6f}" for loss in losses(config, seen["fp32"], found)))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit status: 0, or 2 for bad input."""
    warnings.filterwarnings("ignore")
    parser = FlagParser(__doc__)
    parser.add_argument("--micro-batches", type=int, default=4, help="how many to look at")
    own, rest = parser.parse_known_args(argv)
    try:
        batching = [
            "--objective",
            "laver",
            "--micro-batch-size",
            "1",
            "--global-batch-size",
            str(own.micro_batches),
        ]
        recipes = {arm: parse([*rest, *batching, *flags.split()])[0] for arm, flags in ARMS.items()}
        config = recipes["fp32"]
        check_world(config, 1)
        device = parallel.init_distributed()
        topology = parallel.build_topology(config.parallel, device)
        tokenizer = build_tokenizer(config)
        vocab_size = resolve_vocab_size(config, tokenizer)
        steps = build_data(config, tokenizer).iterate(
            0,
            1,
            global_batch_size=own.micro_batches,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
            image_share=(0, 1),
        )
        batches = next(steps)
        steps.close()
        seen = {arm: see(recipe, topology, vocab_size, batches) for arm, recipe in recipes.items()}
        print(report(config, seen))
    except (ConfigError, DataError) as error:
        print(f"measure_teacher_precision.py: error: {error}", file=sys.stderr)
        return 2
    parallel.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
