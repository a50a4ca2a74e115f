"""What a dialogue costs in a recipe's model: the FLOPs of `accounting.flops` as weights of a dialogue's numbers."""

from dataclasses import replace

from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.work import StepWork, micro_batch_work
from laver_mcore.config.schema import Config, ParallelConfig
from laver_mcore.data.order.cost import PackingCost

_SIDES = (16, 48)
"""Sides of two images, in visual tokens, between which the tower's cost is taken as linear plus quadratic."""


def training_cost(config: Config, vocab_size: int) -> PackingCost:
    """The recipe's cost weights; nothing of how the model is spread over ranks is in them, as in the order of data."""
    config = replace(config, parallel=ParallelConfig())

    def flops(work: StepWork) -> float:
        return step_flops(config, vocab_size, work).total.hardware

    def per_visual_token(side: int) -> float:
        num = side**2
        work = micro_batch_work(
            config,
            document_lengths=(),
            image_grids=[(side, side)],
            student_rows=num if config.objective.reconstructs else 0,
            teacher_rows=num if config.objective.teacher(config) else 0,
            supervised_rows=0,
            masked_rows=0,
        )
        return flops(work) / num

    unit = flops(StepWork(dialogue_rows=1))
    small, large = _SIDES
    linear, steep = per_visual_token(small), per_visual_token(large)
    visual_pair = (steep - linear) / (large**2 - small**2)
    return PackingCost(
        text_token=flops(StepWork(supervised_rows=1)) / unit,
        pair=flops(StepWork(dialogue_pairs=1)) / unit,
        visual_token=(linear - visual_pair * small**2) / unit,
        visual_pair=visual_pair / unit,
    )
