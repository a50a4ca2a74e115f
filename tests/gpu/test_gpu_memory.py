"""Predicted bytes against what CUDA allocates for one step of one GPU."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

SHAPE = (
    "--num-layers 8 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 16 --num-query-groups 4 "
    "--vocab-size 32000 --seq-length 2048 --pad-to-multiple 128 --vision-head-hidden-size 1024 --bf16 "
    "--micro-batch-size 4 --global-batch-size 4 --transformer-impl local"
)
VARIANTS = {
    "plain": "",
    "lm_only": "--objective lm",
    "full_recompute": "--recompute-granularity full",
    "decoder_frozen": "--trainable connector.* mask_token vision_head.*",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    from sample_run import write_recipe, write_sample_data

    directory = tmp_path_factory.mktemp("memory")
    write_sample_data(directory, num_samples=512)
    write_recipe(directory)
    return directory


@pytest.mark.parametrize("name", VARIANTS)
def test_within_a_tenth(directory, name):
    from laver_mcore.accounting.memory import rank_memory
    from laver_mcore.accounting.work import StepWork
    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import build_data, build_engine, build_tokenizer
    from laver_mcore.train.step import train_step

    config, _ = parse(f"--config {directory}/recipe.yaml {SHAPE} {VARIANTS[name]}".split())
    device = parallel.init_distributed()
    topology = parallel.build_topology(config.parallel, device)
    data = build_data(config, build_tokenizer(config))
    before = torch.cuda.memory_allocated()
    engine, _ = build_engine(config, topology, 32000)
    steps = data.iterate(
        0, 3, global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1, image_share=(0, 1)
    )
    for iteration, batches in enumerate(steps):
        # The optimizer's state and libraries' buffers come with the first step; the last one is measured.
        torch.cuda.reset_peak_memory_stats()
        result = train_step(engine, batches, iteration)
    torch.cuda.synchronize()
    work = StepWork.of(result.work.tolist())
    predicted = rank_memory(config, 32000, work, pp_rank=0, dp_size=1, num_micro_batches=1)
    stays = predicted.weights + predicted.gradients + predicted.optimizer + predicted.teacher
    assert torch.cuda.memory_allocated() - before == pytest.approx(stays, rel=0.1)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(predicted.total, rel=0.1)
    del engine, result, batches, steps
    torch.cuda.empty_cache()
