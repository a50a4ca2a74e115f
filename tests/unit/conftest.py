"""What several files test with."""

import warnings

import pytest
from sample_run import write_recipe, write_sample_data


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny model in training, which has taken one step."""
    # Imported here: most of what this folder tests has no need of Megatron-Core.
    import torch.distributed as dist

    from laver_mcore.config.load import parse
    from laver_mcore.megatron import parallel
    from laver_mcore.train.build import build_data, build_engine, build_tokenizer, resolve_vocab_size
    from laver_mcore.train.step import train_step

    warnings.filterwarnings("ignore")
    joined = dist.is_initialized()
    device = parallel.init_distributed()
    directory = tmp_path_factory.mktemp("data")
    write_sample_data(directory, num_samples=12)
    config = parse(["--config", str(write_recipe(directory))])[0]
    topology = parallel.build_topology(config.parallel, device)
    tokenizer = build_tokenizer(config)
    engine = build_engine(config, topology, resolve_vocab_size(config, tokenizer))[0]
    sizes = {"global_batch_size": 4, "micro_batch_size": 1, "image_share": (0, 1)}
    train_step(
        engine, build_data(config, tokenizer).step_batches(0, **sizes), 0
    )  # which gives Adam its moments
    yield engine
    parallel.forget_groups()
    if not joined:
        parallel.shut_down()
