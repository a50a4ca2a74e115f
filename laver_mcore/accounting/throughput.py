"""What a run achieves: FLOPs of its steps over the time they took."""

from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.schema import Config


def throughput(
    config: Config, vocab_size: int, work: StepWork, seconds: float, num_gpus: int, peak: float | None
) -> dict[str, float | None]:
    """Entries of the metrics line for steps that held `work` and took `seconds` together.

    `tflops_per_gpu` counts useful FLOPs, as Megatron does; `mfu` and `hfu` are shares of `peak` (TFLOP/s of one GPU),
    null where that is unknown.
    """
    total = step_flops(config, vocab_size, work).total
    model, hardware = (flops / seconds / num_gpus / 1e12 for flops in (total.model, total.hardware))
    return {
        "padding_share": work.padding_share,
        "tflops_per_gpu": model,
        "mfu": model / peak if peak else None,
        "hfu": hardware / peak if peak else None,
    }
