"""The only place where objects are wired: configuration -> data, model, optimizer, teacher."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from laver_kernels.backend import decide
from laver_mcore.accounting.training_cost import training_cost
from laver_mcore.config.decoders import chat_templates
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import from_recipe
from laver_mcore.config.objectives import load_objective
from laver_mcore.config.schema import Config
from laver_mcore.convert.decoder import check_weights
from laver_mcore.convert.safetensors_directory import open_weights
from laver_mcore.convert.weights import load_hf_weights
from laver_mcore.data.images.native import native_processor
from laver_mcore.data.images.processors import FixedImageProcessor, ImageProcessor, PatchImageProcessor
from laver_mcore.data.images.target_cache import TargetCache
from laver_mcore.data.images.target_pixels import TargetProcessor, TargetSource, view_of
from laver_mcore.data.records.finevision import RatingFilter
from laver_mcore.data.sequence.tokenizer import Tokenizer, load_tokenizer
from laver_mcore.data.serve.loader import DialogueData
from laver_mcore.megatron.optimizer import build_optimizer, weight_buckets
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.initialize import initialize
from laver_mcore.model.inputs import AttentionGeometry
from laver_mcore.model.layer_spec import transformer_config
from laver_mcore.model.network import Network
from laver_mcore.model.parameters import freeze, training_of, unwrap
from laver_mcore.model.vision_encoders import read_sizes
from laver_mcore.model.vision_language import VisionLanguageModel
from laver_mcore.objectives.objective import Parts
from laver_mcore.shapes.frozen import input_side
from laver_mcore.train import saved_weights
from laver_mcore.train.engine import Engine


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What building the model found out, for the lines printed at the start."""

    trainable: list[tuple[str, int, int]]
    fresh: list[str]


def build_tokenizer(config: Config) -> Tokenizer:
    """The recipe's tokenizer, with the chat template that the recipe or its decoder's family says."""
    assert config.data.tokenizer_model is not None
    return load_tokenizer(
        config.data.tokenizer_model, *chat_templates(config.model.family, config.data.chat_template)
    )


def build_image_processor(config: Config) -> ImageProcessor | None:
    """How images become the pixels that the recipe's visual path wants; None for text alone."""
    vision = config.vision
    if not vision.has_images:
        return None
    if vision.is_encoder_free:
        return PatchImageProcessor(image_size=vision.image_size, patch_size=vision.patch_size)
    assert vision.tower is not None
    assert vision.vision_path is not None
    if vision.tower.native is not None:
        return native_processor(
            vision.tower.native,
            vision.vision_path,
            min_pixels=vision.min_pixels,
            max_pixels=vision.max_pixels,
        )
    return FixedImageProcessor(vision.vision_path, **read_sizes(vision.vision_path))


def build_targets(config: Config, tower: ImageProcessor | None) -> TargetSource | None:
    """How images become what the objective's frozen encoder wants, or its features; None where it has none."""
    target = config.objective.target_encoder()
    if target is None or tower is None:
        return None
    if target.cache is not None:
        cache = TargetCache(target.cache)
        cache.check(kind=target.kind, view=view_of(tower))
        return cache
    assert target.path is not None
    return TargetProcessor(target.path, tower=tower, image_size=input_side(target))


def build_data(config: Config, tokenizer: Tokenizer, device: torch.device | None = None) -> DialogueData:
    """The recipe's data, read and validated whole; batches go to `device`."""
    data, image_processor = config.data, build_image_processor(config)
    return DialogueData(
        list(data.data_path),
        image_folder=data.image_folder,
        allow_outside_images=data.allow_outside_images,
        tokenizer=tokenizer,
        image_processor=image_processor,
        targets=build_targets(config, image_processor),
        seq_length=data.seq_length,
        seed=config.train.seed,
        system_prompt=data.system_prompt,
        overlong=data.overlong,
        weights=data.data_weights or None,
        packing_window=data.packing_window if data.packing else 1,
        cost=training_cost(config, resolve_vocab_size(config, tokenizer)),
        image_backend=data.image_backend,
        ratings=RatingFilter(
            relevance=data.min_relevance,
            visual_dependency=data.min_visual_dependency,
            image_correspondence=data.min_image_correspondence,
            formatting=data.min_formatting,
        ),
        num_workers=data.num_workers,
        worker_timeout=data.worker_timeout,
        decode_threads=data.decode_threads,
        max_bad_fraction=data.max_bad_fraction,
        quarantine=Path(config.run.save) / "quarantine.jsonl" if config.run.save else None,
        index_folder=Path(data.index_folder) if data.index_folder else None,
        device=device,
    )


def resolve_vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    """The model's vocabulary before padding: the recipe's or preset's, else the tokenizer's.

    It grows by the tokens for vision that the tokenizer lacks, where it has no rows to spare.
    """
    wanted, added = config.model.vocab_size, len(tokenizer.added)
    own = tokenizer.vocab_size - added
    needed = own if not config.vision.has_images else tokenizer.vocab_size
    if wanted is None:
        return needed
    if own > wanted:
        raise ConfigError(
            f"the tokenizer has {own} tokens, vocab_size is {wanted}; use the model's own tokenizer"
        )
    return max(wanted, needed)


def with_kernels(config: Config, device: torch.device) -> Config:
    """The recipe with kernels `auto` decided for this device: once here, not by every operation on every rank."""
    kernels = decide(config.train.kernels, device).impl
    return replace(config, train=replace(config.train, kernels=kernels))


def build_chunks(config: Config, topology: Topology, vocab_size: int) -> list[VisionLanguageModel]:
    """This rank's pipeline chunks with unset weights."""
    mcore = transformer_config(config)
    stages: list[int | None] = list(range(topology.vp_size)) if topology.vp_size else [None]
    added = load_objective(config.objective.name).modules
    return [VisionLanguageModel(config, mcore, topology, vocab_size, stage, added) for stage in stages]


def start_weights(
    chunks: list[VisionLanguageModel], config: Config, vocab_size: int, topology: Topology
) -> list[str]:
    """Give every parameter the value that a run begins with; returns the names that another run's weights lack."""
    initialize(chunks, config, vocab_size, topology)
    if config.run.pretrained_checkpoint:
        return _load_run(chunks, config, vocab_size, topology, config.run.pretrained_checkpoint)
    if config.run.hf_path:
        weights = open_weights(config.run.hf_path, allow_pickle=config.run.allow_pickle)
        check_weights(weights, config.model, config.model.vocab_size or vocab_size, config.run.hf_path)
        load_hf_weights(chunks, config.model, vocab_size, topology, weights)
    return []


def _load_run(
    chunks: list[VisionLanguageModel],
    config: Config,
    vocab_size: int,
    topology: Topology,
    directory: str | Path,
) -> list[str]:
    """The weights of a run; where its checkpoint holds adapters alone, first those that it started from itself."""
    if saved_weights.lacks_frozen(directory):
        theirs = from_recipe(Path(directory) / "config.yaml")
        start_weights(chunks, replace(config, run=theirs.run, train=theirs.train), vocab_size, topology)
    return saved_weights.load_weights(chunks, config, vocab_size, directory)


def finalize_grads(
    models: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **groups: object
) -> None:
    """Megatron's gradient reductions, then the sum over TP for parameters that saw a share of the images each.

    `num_tokens` is Megatron's own divisor; here losses are divided by their global counts before the backward.
    """
    finalize_model_grads(models, None, **groups)
    shared = [
        parameter
        for model in models
        for parameter in unwrap(model).parameters()
        if parameter.requires_grad and getattr(parameter, "shared_over_tp", False)
    ]
    tp_group = unwrap(models[0]).tp_group
    if not shared or tp_group.size() == 1:
        return
    grads = [parameter.main_grad for parameter in shared]
    flat = _flatten_dense_tensors(grads)
    torch.distributed.all_reduce(flat, group=tp_group)
    for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
        grad.copy_(summed)


def _wrap(config: Config, chunks: list[VisionLanguageModel]) -> list[DistributedDataParallel]:
    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    mcore = chunks[0].config
    models = [
        DistributedDataParallel(mcore, settings, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    mcore.finalize_model_grads_func = finalize_grads
    if parallel.overlap_grad_reduce:
        syncs = [model.no_sync for model in models]
        mcore.no_sync_func = syncs if len(models) > 1 else syncs[0]
        if len(models) > 1:
            mcore.grad_sync_func = [model.start_grad_sync for model in models]
    return models


def build_engine(
    config: Config, topology: Topology, vocab_size: int, tokenizer: Tokenizer | None = None
) -> tuple[Engine, BuildReport]:
    """Model, optimizer and teacher of this rank; weights random, of `pretrained_checkpoint`, or of `hf_path`."""
    config = with_kernels(config, topology.device)
    chunks = build_chunks(config, topology, vocab_size)
    fresh = start_weights(chunks, config, vocab_size, topology)
    trainable = freeze(chunks, training_of(config), topology)
    models = _wrap(config, chunks)
    optimizer = build_optimizer(config, models)
    parts = Parts(
        chunks=chunks,
        topology=topology,
        buckets=weight_buckets(chunks, optimizer),
    )
    objective = load_objective(config.objective.name).build(config, parts)
    engine = Engine(
        config=config,
        topology=topology,
        models=list(models),
        optimizer=optimizer,
        objective=objective,
        tokenizer_digest=None if tokenizer is None else tokenizer.fingerprint(),
        geometry=attention_geometry(config),
        vocab_size=vocab_size,
    )
    return engine, BuildReport(trainable=trainable, fresh=fresh)


def build_network(config: Config, topology: Topology, vocab_size: int, directory: str | Path) -> Network:
    """The model alone, with the weights of the newest checkpoint under `directory`."""
    config = with_kernels(config, topology.device)
    chunks = build_chunks(config, topology, vocab_size)
    initialize(chunks, config, vocab_size, topology)
    _load_run(chunks, config, vocab_size, topology, directory)
    return Network(
        config=config,
        topology=topology,
        models=list(chunks),
        geometry=attention_geometry(config),
        vocab_size=vocab_size,
    )


def attention_geometry(config: Config) -> AttentionGeometry:
    """Positions and mask as the recipe wants them."""
    model = config.model
    assert model.kv_channels is not None
    assert model.rotary_base is not None
    assert model.mrope_section is not None
    return AttentionGeometry(
        head_dim=model.kv_channels,
        rotary_base=model.rotary_base,
        mrope_section=model.mrope_section,
        rope_scaling=model.rope_scaling,
        mrope_split=model.mrope_split,
        rope_2d=config.attention.rope_2d,
        mixed=config.attention.mixed_attention,
    )
