"""What every number of a recipe must be by itself: finite, and not below what makes sense."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import Config

_AT_LEAST_1 = """
model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups
model.kv_channels model.vocab_size model.make_vocab_size_divisible_by
vision.image_size vision.patch_size vision.min_pixels vision.max_pixels vision.connector_hidden_size
data.decode_threads data.seq_length data.packing_window data.pad_to_multiple
parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size parallel.context_parallel_size
parallel.num_virtual_stages_per_pipeline_rank parallel.recompute_num_layers
train.train_iters train.micro_batch_size train.global_batch_size
validation.eval_interval validation.eval_iters validation.eval_answer_tokens validation.probe_interval
run.save_interval run.keep_last run.keep_every run.max_skipped run.exit_interval run.log_interval
run.check_weight_hash_across_dp_replicas_interval
run.profile_step_start run.profile_step_end
"""
_AT_LEAST_0 = """
model.lora_rank model.init_method_std data.num_workers data.max_bad_fraction data.data_weights
optimizer.lr optimizer.min_lr optimizer.lr_warmup_iters optimizer.weight_decay optimizer.adam_beta1 optimizer.adam_beta2
optimizer.clip_grad train.seed validation.eval_answers run.skip_to run.silent_rank_timeout run.profile_ranks
"""
_ABOVE_0 = """
model.rotary_base model.norm_epsilon data.worker_timeout optimizer.adam_eps run.peak_tflops
"""
_BELOW_1 = "optimizer.adam_beta1 optimizer.adam_beta2"
_RULES = (
    ((*_AT_LEAST_1.split(), "a size"), lambda number: number >= 1, "must be at least 1"),
    ((*_AT_LEAST_0.split(), "a weight"), lambda number: number >= 0, "must not be negative"),
    (_ABOVE_0.split(), lambda number: number > 0, "must be positive"),
    (_BELOW_1.split(), lambda number: number < 1, "must be below 1"),
)


def check_bounds(config: Config) -> None:
    """`ConfigError` for the first number that cannot be meant, whatever the others are."""
    for section in fields(Config):
        for field in fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), field.name)
            for number in _numbers(value):
                if not math.isfinite(number):
                    raise ConfigError(f"{field.name}={value} must be a finite number")
                for names, holds, what in _RULES:
                    if _named(section.name, field.name) in names and not holds(number):
                        raise ConfigError(f"{field.name}={value} {what}")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise ConfigError(f"min_lr={config.optimizer.min_lr} is above lr={config.optimizer.lr}")


def _named(section: str, field: str) -> str:
    """What the rules know a number as: an objective's by the kind of thing that it is."""
    if section != "objective":
        return f"{section}.{field}"
    return "a weight" if field.startswith("lambda_") else "a size" if field.endswith("_size") else field


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
