"""Every check that needs more than one field, made once, before anything is built."""

import fnmatch

from laver_mcore.config.architecture import PROJECTIONS
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _divisors(*values: int, limit: int = 64) -> str:
    found = [str(d) for d in range(1, limit + 1) if all(v % d == 0 for v in values)]
    return ", ".join(found[:-1]) + (" or " if len(found) > 1 else "") + found[-1]


def _check_model(config: Config) -> None:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    heads, groups, layers = model.num_attention_heads, model.num_query_groups, model.num_layers
    assert heads and groups and layers and model.kv_channels and model.ffn_hidden_size and model.mrope_section
    for name, value in (("num_attention_heads", heads), ("num_query_groups", groups)):
        _require(
            value % tp == 0,
            f"{name}={value} is not divisible by tensor_model_parallel_size={tp}; "
            f"use {_divisors(heads, groups)}",
        )
    _require(
        model.ffn_hidden_size % tp == 0,
        f"ffn_hidden_size={model.ffn_hidden_size} is not divisible by tensor_model_parallel_size={tp}; "
        f"use {_divisors(model.ffn_hidden_size)}",
    )
    _require(
        heads % groups == 0, f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}"
    )
    chunks = pp * (parallel.num_virtual_stages_per_pipeline_rank or 1)
    _require(
        layers % chunks == 0,
        f"num_layers={layers} is not divisible by {chunks} pipeline chunks (pipeline_model_parallel_size={pp} x "
        f"num_virtual_stages_per_pipeline_rank={chunks // pp}); use {_divisors(layers)} chunks",
    )
    _require(model.kv_channels % 2 == 0, f"kv_channels={model.kv_channels} must be even for rotary positions")
    _require(
        sum(model.mrope_section) == model.kv_channels // 2,
        f"mrope_section={model.mrope_section} sums to {sum(model.mrope_section)}, "
        f"not to half of kv_channels={model.kv_channels}",
    )
    _check_lora(config)
    _require(model.attention_dropout == 0.0, "attention_dropout must be 0: mixed attention has no dropout")


def _check_lora(config: Config) -> None:
    model, train = config.model, config.train
    _require(model.lora_rank >= 0, f"lora_rank={model.lora_rank} must not be negative; 0 is no LoRA")
    if not model.lora_rank:
        return
    _require(model.lora_alpha > 0.0, f"lora_alpha={model.lora_alpha} must be positive")
    _require(0.0 <= model.lora_dropout < 1.0, f"lora_dropout={model.lora_dropout} must be from 0 to below 1")
    targets = [*PROJECTIONS, *(name for names in PROJECTIONS.values() for name in names)]
    for pattern in model.lora_targets or ("",):
        _require(
            bool(fnmatch.filter(targets, pattern)),
            f"lora_targets pattern {pattern!r} matches no layer; there are {', '.join(targets)}",
        )
    _require(
        train.transformer_impl != "transformer_engine",
        "lora_rank: adapters stand beside Megatron's local layers; use transformer_impl=local",
    )
    teacher = config.objective.teacher(config)
    _require(
        teacher is None or teacher.precision == "same",
        "lora_rank with teacher_precision=fp8 is not supported; use teacher_precision=same",
    )


def _check_parallel(config: Config) -> None:
    parallel, train = config.parallel, config.train
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    _require(
        not parallel.sequence_parallel or tp > 1,
        "sequence_parallel needs tensor_model_parallel_size > 1; drop the flag or raise the size",
    )
    _require(
        virtual is None or (virtual > 1 and pp > 1),
        f"num_virtual_stages_per_pipeline_rank={virtual} needs a value above 1 and pipeline_model_parallel_size > 1",
    )
    rows, cp = train.micro_batch_size * config.data.seq_length, parallel.context_parallel_size
    _require(
        config.data.pad_to_multiple % (tp * cp) == 0 and rows % (tp * cp) == 0,
        f"pad_to_multiple={config.data.pad_to_multiple} and micro_batch_size x seq_length={rows} "
        f"must be divisible by tensor_model_parallel_size x context_parallel_size = {tp * cp}",
    )
    _require(
        not parallel.overlap_param_gather
        or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce; add both, or drop it",
    )
    _require(
        parallel.recompute_granularity == "full" or parallel.recompute_method is None,
        f"recompute_method={parallel.recompute_method} needs recompute_granularity=full",
    )


def _check_validation(config: Config) -> None:
    asked, run = config.validation, config.run
    for name in ("eval_interval", "eval_iters", "eval_answer_tokens"):
        value = getattr(asked, name)
        _require(value >= 1, f"{name}={value} must be at least 1")
    _require(asked.eval_answers >= 0, f"eval_answers={asked.eval_answers} must not be negative")
    wanted = [
        name
        for name in ("eval_answers", "probe_interval", "save_best", "valid_image_folder")
        if getattr(asked, name)
    ]
    _require(
        bool(asked.valid_data_path) or not wanted,
        f"{', '.join(wanted)} needs held-out data: --valid-data-path FILE",
    )
    not_json = [path for path in asked.valid_data_path if not path.endswith((".json", ".jsonl"))]
    _require(
        not asked.eval_answers or not not_json,
        f"eval_answers reads questions from JSON or JSONL, not from {', '.join(not_json)}; leave it out",
    )
    _require(asked.save_best is None or run.save is not None, "save_best needs --save DIR")
    _require(
        asked.save_best != "valid_accuracy" or asked.eval_answers > 0,
        "save_best=valid_accuracy needs answers: --eval-answers N",
    )


def _check_context_parallel(config: Config) -> None:
    """Inside attention context parallelism shares out heads, so their numbers decide what is possible."""
    cp, tp = config.parallel.context_parallel_size, config.parallel.tensor_model_parallel_size
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    assert heads and groups
    heads, groups = heads // tp, groups // tp
    fitting = [c for c in range(1, heads + 1) if heads % c == 0 and (groups % c == 0 or c % groups == 0)]
    _require(
        cp in fitting,
        f"context_parallel_size={cp} cannot share {heads} query and {groups} key/value heads of each tensor-parallel "
        f"rank evenly; use {', '.join(map(str, fitting))}",
    )


def _check_vision(config: Config) -> None:
    vision = config.vision
    _require(
        not config.objective.normalizes or bool(vision.normalize_visual_tokens),
        f"objective={config.objective.name} needs visual tokens of unit length; leave out normalize_visual_tokens",
    )
    _require(
        vision.tower is None or vision.vision_path is not None,
        f"vision={vision.vision} needs vision_path, a Hugging Face directory with its config and weights",
    )
    _require(
        not vision.is_encoder_free or vision.image_size % vision.patch_size == 0,
        f"image_size={vision.image_size} is not a multiple of patch_size={vision.patch_size}",
    )


def _check_teacher_precision(config: Config) -> None:
    """What fp8 needs of the recipe; what it needs of the device is asked where layers are built."""
    teacher, model, tp = (
        config.objective.teacher(config),
        config.model,
        config.parallel.tensor_model_parallel_size,
    )
    if teacher is None or teacher.precision == "same":
        return
    given = f"teacher_precision={teacher.precision}"
    _require(
        config.train.transformer_impl != "transformer_engine",
        f"{given} runs in Megatron's local layers; use transformer_impl=local",
    )
    assert model.hidden_size and model.ffn_hidden_size and model.kv_channels
    assert model.num_attention_heads and model.num_query_groups
    widths = {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size / tensor_model_parallel_size": model.ffn_hidden_size // tp,
        "num_attention_heads x kv_channels / tensor_model_parallel_size": (
            model.num_attention_heads * model.kv_channels // tp
        ),
        "num_query_groups x kv_channels x 2 / tensor_model_parallel_size": (
            2 * model.num_query_groups * model.kv_channels // tp
        ),
    }
    for name, width in widths.items():
        _require(
            width % 16 == 0,
            f"{given} needs multiples of 16, and {name} is {width}; use another size, or teacher_precision=same",
        )


def _check_data(config: Config) -> None:
    data, vision, skip_to = config.data, config.vision, config.run.skip_to
    for name in ("min_relevance", "min_visual_dependency", "min_image_correspondence", "min_formatting"):
        value = getattr(data, name)
        _require(value is None or 1 <= value <= 5, f"{name}={value} is no rating; use 1 to 5")
    _require(data.packing_window >= 1, f"packing_window={data.packing_window} must be at least 1")
    _require(data.worker_timeout > 0, f"worker_timeout={data.worker_timeout} must be positive (seconds)")
    _require(skip_to is None or skip_to >= 0, f"skip_to={skip_to} must not be negative; steps count from 0")
    bounds = (vision.min_pixels, vision.max_pixels)
    _require(
        bounds == (None, None) or vision.is_native,
        f"min_pixels and max_pixels bound images of native resolution; vision={vision.vision} has a fixed one",
    )
    _require(
        vision.min_pixels is None or vision.max_pixels is None or vision.min_pixels <= vision.max_pixels,
        f"min_pixels={vision.min_pixels} is more than max_pixels={vision.max_pixels}",
    )


def _check_run(config: Config) -> None:
    train, run = config.train, config.run
    for name in ("train_iters", "micro_batch_size", "global_batch_size"):
        _require(getattr(train, name) >= 1, f"{name}={getattr(train, name)} must be at least 1")
    _require(
        run.load is None or run.pretrained_checkpoint is None,
        "load resumes a run and pretrained_checkpoint starts a new one from its weights: give one of them",
    )
    _require(
        run.hf_path is None or run.pretrained_checkpoint is None,
        "hf_path and pretrained_checkpoint both give the starting weights: give one of them",
    )
    _require(
        run.peak_tflops is None or run.peak_tflops > 0, f"peak_tflops={run.peak_tflops} must be positive"
    )
    _require(
        not run.profile or run.save is not None, "profile writes its traces under the run's folder: give save"
    )
    _require(
        not run.profile or 1 <= run.profile_step_start < run.profile_step_end,
        f"profile_step_start={run.profile_step_start} and profile_step_end={run.profile_step_end}: "
        "iterations count from 1, and the end is not traced any more",
    )
    _require(
        not run.record_memory_history or run.profile,
        "record_memory_history comes with the trace: add profile",
    )
    _require(
        bool(train.trainable), "trainable is empty, so nothing would train; give name patterns, or * for all"
    )
    _require(bool(config.data.data_path), "data_path is empty; give one or more data sets: files or folders")
    _require(
        config.data.tokenizer_model is not None,
        "tokenizer_model is missing; give a directory or a .model file",
    )


def check(config: Config) -> None:
    """Raise `ConfigError` for the first combination that cannot run; the world size is checked separately."""
    _check_run(config)
    _check_validation(config)
    _check_data(config)
    _check_vision(config)
    config.objective.check(config)  # what follows divides by them
    _check_model(config)
    _check_teacher_precision(config)
    _check_context_parallel(config)
    _check_parallel(config)


def check_world(config: Config, world_size: int) -> int:
    """Return the data-parallel size that `world_size` ranks give, or raise `ConfigError`."""
    parallel, train = config.parallel, config.train
    model_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    model_size *= parallel.context_parallel_size
    _require(
        world_size % model_size == 0,
        f"world size {world_size} is not divisible by tensor x pipeline x context parallel size {model_size}; "
        f"start {model_size} ranks or a multiple (torchrun --nproc-per-node {model_size})",
    )
    dp = world_size // model_size
    rows = train.micro_batch_size * dp
    _require(
        train.global_batch_size % rows == 0,
        f"global_batch_size={train.global_batch_size} is not divisible by micro_batch_size x data-parallel size "
        f"= {train.micro_batch_size} x {dp}",
    )
    micro_batches = train.global_batch_size // rows
    _require(
        parallel.num_virtual_stages_per_pipeline_rank is None
        or micro_batches % parallel.pipeline_model_parallel_size == 0,
        f"the interleaved schedule needs a number of micro-batches divisible by pipeline_model_parallel_size="
        f"{parallel.pipeline_model_parallel_size}, got {micro_batches}",
    )
    return dp
