"""Memory by formula against the tensors of real engines, in real process groups."""

import json
from dataclasses import replace

import pytest
from sample_run import write_recipe, write_sample_data

from integration.harness import torchrun
from laver_mcore.accounting.memory import chunks_in_flight, holdings, rank_memory, state_bytes
from laver_mcore.accounting.work import StepWork
from laver_mcore.config.load import parse
from laver_mcore.config.schema import Config, ModelConfig, ParallelConfig

UNTIED = "--untie-embeddings-and-output-weights True"
# Name -> (TP, PP, replicas: DP x CP, flags).
ENGINES = {
    "fp32": (1, 1, 1, ""),
    "frozen_parts": (1, 1, 1, "--trainable connector.* mask_token language_model.decoder.layers.[13].*"),
    "tp2_sp_bf16": (2, 1, 1, "--sequence-parallel --bf16"),
    "qwen3_tp2_sp_bf16": (2, 1, 1, "--family qwen3 --sequence-parallel --bf16"),
    "llama": (1, 1, 1, "--family llama"),
    "lora_tp2_sp_bf16": (2, 1, 1, "--lora-rank 4 --sequence-parallel --bf16"),
    "lora_dp2_distributed": (1, 1, 2, "--lora-rank 4 --use-distributed-optimizer --bf16"),
    "tp2_untied": (2, 1, 1, UNTIED),
    "pp2_tied": (1, 2, 1, ""),
    "pp2_interleaved_bf16": (1, 2, 1, f"--num-virtual-stages-per-pipeline-rank 2 --bf16 {UNTIED}"),
    "dp2": (1, 1, 2, "--bf16"),
    "dp2_distributed_bf16": (1, 1, 2, "--use-distributed-optimizer --bf16"),
    "offloaded_teacher": (1, 1, 1, "--offload-teacher"),
    "cp2_distributed_bf16": (1, 1, 2, "--context-parallel-size 2 --use-distributed-optimizer --bf16"),
    "tp2_fp8_teacher": (2, 1, 1, "--teacher-precision fp8 --ema-steps 100"),
    "tp2_pp2_bf16": (2, 2, 1, "--bf16"),
    "pp2_dp2_distributed_bf16": (1, 2, 2, f"--use-distributed-optimizer --bf16 {UNTIED}"),
}
# What layers save: one micro-batch, attention that saves as the kernels do. In fp32, for gloo and exactness.
LAYERS = {
    "saved_whole": (1, 1, 1, ""),
    "saved_selective": (1, 1, 1, "--recompute-granularity selective"),
    "saved_qwen3": (1, 1, 1, "--family qwen3"),
    "saved_lora": (1, 1, 1, "--lora-rank 8"),
    "saved_lora_tp2_sp": (2, 1, 1, "--lora-rank 8 --sequence-parallel"),
    "saved_qwen3_selective": (1, 1, 1, "--family qwen3 --recompute-granularity selective"),
    "saved_full": (1, 1, 1, "--recompute-granularity full"),
    "saved_block": (
        1,
        1,
        1,
        "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
    ),
    "saved_tp2": (2, 1, 1, ""),
    "saved_tp2_sp": (2, 1, 1, "--sequence-parallel"),
    "saved_cp2": (1, 1, 2, "--context-parallel-size 2"),
}
# Layers that are not recomputed, where that is not all.
WHOLE_LAYERS = {"saved_full": 0, "saved_block": 1}
ALL = {**ENGINES, **LAYERS}


def argv_of(directory, name):
    tp, pp, _, flags = ALL[name]
    flags += f" --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    flags += " --global-batch-size 1" if name in LAYERS else ""
    return f"--config {directory}/recipe.yaml --kernels reference {flags}".split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    write_sample_data(directory, num_samples=12)
    write_recipe(directory)
    for ranks in (1, 2, 4):
        plan = [
            {"name": name, "argv": argv_of(directory, name), "save_like_the_kernels": name in LAYERS}
            for name, (tp, pp, dp, _) in ALL.items()
            if tp * pp * dp == ranks
        ]
        (directory / "plan.json").write_text(json.dumps(plan))
        done = torchrun(ranks, "tests/integration/accounting_worker.py", str(directory / "plan.json"))
        assert done.returncode == 0, done.stderr[-6000:]
    return directory


def observed(directory, name):
    """The configuration, and what each rank found, grouped by pipeline rank."""
    config, _ = parse(argv_of(directory, name))
    tp, pp, dp, _ = ALL[name]
    ranks = [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(tp * pp * dp)]
    return config, [ranks[stage * tp * dp : (stage + 1) * tp * dp] for stage in range(pp)]


@pytest.mark.parametrize("name", ENGINES)
def test_bytes_that_stay(directory, name):
    """Exactly, summed over the data-parallel ranks: Megatron cuts shards without regard to parameters."""
    config, stages = observed(directory, name)
    (tp, _, dp, _), cp = ALL[name], config.parallel.context_parallel_size
    for pp_rank, ranks in enumerate(stages):
        held = holdings(config, ranks[0]["vocab_size"])[pp_rank]
        expected = state_bytes(config, held, dp // cp)
        if config.objective.teacher(config).offload:  # here the host's memory is the device's
            assert expected["teacher"] == 4 * held.averaged
            expected["teacher"] += 4 * held.averaged
        for tp_rank in range(tp):
            replicas = [found["bytes"] for found in ranks[tp_rank::tp]]
            for part, wanted in expected.items():
                assert sum(each[part] for each in replicas) == dp * wanted, (part, pp_rank)
    sharded = config.parallel.use_distributed_optimizer
    assert sharded == (dp > 1 and "distributed" in name)


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_that_layers_save(directory, name):
    config, ((found, *_),) = observed(directory, name)
    vocab_size = found["vocab_size"]
    work = StepWork.of(found["work"])
    whole = rank_memory(config, vocab_size, work, pp_rank=0, dp_size=1, num_micro_batches=1).activations
    edges = whole - _layers_alone(config, vocab_size, work)
    # The block's final norm is among the edges, but its input is saved inside. On the CPU torch's rms_norm, which is
    # one kernel on a GPU, also keeps its normalised input, where the norm trains.
    rows = work.dialogue_rows + work.visual_tokens + work.student_padding
    shares = ALL[name][0] if config.parallel.sequence_parallel else 1
    norm = 4 * rows * config.model.hidden_size / shares / config.parallel.context_parallel_size
    norms = 1 + 2 * WHOLE_LAYERS.get(name, config.model.num_layers)
    norms = 0 if config.model.lora_rank else norms
    heads = 0  # the same for norms of queries and keys
    if config.model.family == "qwen3":
        channels = (
            config.model.num_attention_heads + config.model.num_query_groups
        ) * config.model.kv_channels
        heads = 4 * rows * channels * config.model.num_layers
    assert found["saved"] == pytest.approx(whole - edges + norm + norms * norm + heads, rel=0.03)


def _layers_alone(config, vocab_size, work):
    """The difference that twice the layers make."""
    layers = config.model.num_layers
    double = replace(config, model=replace(config.model, num_layers=2 * layers))
    if config.parallel.recompute_method == "block":
        blocks = 2 * config.parallel.recompute_num_layers
        double = replace(double, parallel=replace(double.parallel, recompute_num_layers=blocks))
    sizes = [
        rank_memory(c, vocab_size, work, pp_rank=0, dp_size=1, num_micro_batches=1).activations
        for c in (config, double)
    ]
    return sizes[1] - sizes[0]


def schedule_peak(pp, vp, rank, num_micro_batches):
    """Chunks in flight by playing Megatron's schedule: warm-up forwards, one forward one backward, cool-down."""
    total = num_micro_batches * vp
    warm_up = pp - rank - 1 if vp == 1 else (pp - rank - 1) * 2 + (vp - 1) * pp
    warm_up = min(warm_up, total)
    events = ["F"] * warm_up + ["F", "B"] * (total - warm_up) + ["B"] * warm_up
    held = peak = 0
    for event in events:
        held += 1 if event == "F" else -1
        peak = max(peak, held)
    assert held == 0
    return peak


@pytest.mark.parametrize(
    ("pp", "vp", "num"), [(1, 1, 4), (2, 1, 1), (4, 1, 8), (4, 2, 8), (2, 5, 4)], ids=str
)
def test_chunks_in_flight(pp, vp, num):
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vp if vp > 1 else None
    )
    config = Config(model=ModelConfig(num_layers=40), parallel=parallel)
    for rank in range(pp):
        assert chunks_in_flight(config, rank, num) == schedule_peak(pp, vp, rank, num)
