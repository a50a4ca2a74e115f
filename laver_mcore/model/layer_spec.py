"""The decoder as Megatron `ModuleSpec`s, and its `TransformerConfig`.

Transformer Engine's layers are used in bf16 where it is installed; otherwise Megatron's local ones with our RMSNorm.
Both give the same parameter keys in checkpoints, so that a run may move between them.
"""

import functools
import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from laver_mcore.config.architecture import PROJECTIONS
from laver_mcore.config.decoders import family_named
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config, ModelConfig
from laver_mcore.megatron.versions import submodules
from laver_mcore.model.fp8 import Fp8ColumnParallelLinear, Fp8Pass, Fp8RowParallelLinear
from laver_mcore.model.lora import Lora, LoraColumnParallelLinear, LoraRowParallelLinear
from laver_mcore.model.mixed_attention import MixedAttention
from laver_mcore.model.norm import RMSNorm

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
"""The oldest CUDA compute capability whose tensor cores multiply e4m3."""


def use_transformer_engine(transformer_impl: str, bf16: bool) -> bool:
    """Whether layers come from Transformer Engine; `ConfigError` when it is demanded and does not load.

    It multiplies fp32 in TF32, ten bits of mantissa, so fp32 takes local layers unless it is demanded.
    """
    if transformer_impl == "local" or (transformer_impl == "auto" and not bf16):
        return False
    lacking = transformer_engine_lacks()
    if transformer_impl == "transformer_engine" and lacking:
        raise ConfigError(f"transformer_impl=transformer_engine, but {lacking}")
    return lacking is None


@functools.cache
def transformer_engine_lacks() -> str | None:
    """Why Transformer Engine's layers cannot be used here; None where they can. Said once where it is installed."""
    if importlib.util.find_spec("transformer_engine") is None or not torch.cuda.is_available():
        return "it is not installed here (or there is no GPU)"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing library, another ABI, another CUDA: whatever its loading provokes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "Transformer Engine cannot be loaded (%s); Megatron's local layers instead",
            reason,
        )
        return f"it cannot be loaded here ({reason})"
    return None


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's configuration of a decoder under this recipe's precision and parallelism."""
    model, parallel, family = config.model, config.parallel, family_named(config.model.family)
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    interleaved = parallel.num_virtual_stages_per_pipeline_rank is not None
    recompute: dict[str, Any] = {}
    if parallel.recompute_granularity == "full":
        recompute = dict(
            recompute_granularity="full",
            recompute_method=parallel.recompute_method or "uniform",
            recompute_num_layers=parallel.recompute_num_layers or 1,
        )
    elif parallel.recompute_granularity == "selective":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.train.bf16,
        # Lengths differ from micro-batch to micro-batch: stages ask for the shape of each tensor, which
        # `known_shapes.py` answers without an exchange. The interleaved schedule cannot (between two stages, Megatron
        # confuses the shapes of activations and gradients): there all micro-batches of a step are padded to one length.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1 and not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a wait for the GPU after every exchange, against a fault of torch before 2.0
        moe_token_dispatcher_type="alltoall",  # there is no MoE; Megatron refuses variable lengths with its default
        # Losses are divided by global counts in the forward step; Megatron must neither average over micro-batches
        # nor over data-parallel ranks, which is what this flag turns off.
        calculate_per_token_loss=True,
        # Frees an activation once it is sent. gloo may still be reading it then, and so may NCCL on its own stream
        # where sends are not waited for; an exchange in one batch is, in stream order.
        deallocate_pipeline_outputs=torch.cuda.is_available() and not interleaved,
        # Weights are drawn by name afterwards (`initialize.py`), but only an initialising Megatron marks which
        # parameters are sharded, and the gradient norm depends on those marks.
        perform_initialization=True,
        use_cpu_initialization=False,
        # SwiGLU as one operation: its backward computes anew from its input, so two FFN widths less are kept a row.
        bias_activation_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **recompute,
    )


def require_fp8(transformer_impl: str, bf16: bool) -> None:
    """`ConfigError` where the teacher's forward cannot run in fp8: Transformer Engine's layers, or an older GPU."""
    if use_transformer_engine(transformer_impl, bf16):
        raise ConfigError(
            f"teacher_precision=fp8 runs in Megatron's local layers, and transformer_impl={transformer_impl} takes "
            "Transformer Engine's here; use transformer_impl=local"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ConfigError(
            f"teacher_precision=fp8 needs compute capability 8.9 (Ada, Hopper) or newer, and this is a "
            f"{torch.cuda.get_device_name()}; use teacher_precision=same"
        )


def decoder_spec(
    config: TransformerConfig,
    transformer_impl: str,
    kernels: str,
    vp_stage: int | None,
    fp8: Fp8Pass | None = None,
    model: ModelConfig | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk and its final norm, with mixed attention inside.

    With `fp8` matrix products are in fp8 while it runs. `model` says which layers have adapters.
    """
    adapted = model.adapted_layers if model is not None else {}
    if fp8 is not None:
        require_fp8(transformer_impl, config.bf16)
    # Adapters stand beside local layers.
    if use_transformer_engine(transformer_impl, config.bf16) and not adapted:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm: type = TENorm
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(
            normalization="RMSNorm", qk_layernorm=config.qk_layernorm
        )
        if config.qk_layernorm:
            heads = layer.submodules.self_attention.submodules
            heads.q_layernorm = heads.k_layernorm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=MixedAttention, params={"impl": kernels}
    )
    if fp8 is not None:
        column = ModuleSpec(module=Fp8ColumnParallelLinear, params={"fp8": fp8})
        row = ModuleSpec(module=Fp8RowParallelLinear, params={"fp8": fp8})
        attention, mlp = layer.submodules.self_attention.submodules, submodules(layer.submodules.mlp)
        attention.linear_qkv, attention.linear_proj = column, row
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    for name in adapted:
        assert model is not None
        part = (
            layer.submodules.self_attention if name in ("linear_qkv", "linear_proj") else layer.submodules.mlp
        )
        kind = LoraColumnParallelLinear if len(PROJECTIONS[name]) > 1 else LoraRowParallelLinear
        setattr(submodules(part), name, ModuleSpec(module=kind, params={"lora": Lora.of(model, name)}))
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
