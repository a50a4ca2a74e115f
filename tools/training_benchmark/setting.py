"""What is measured: one frozen `Setting`, the same for all arms, that crosses process borders as JSON."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import resolve
from laver_mcore.config.presets import PRESETS
from laver_mcore.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from laver_mcore.objectives.laver import LaverConfig

Arm = Literal["lm", "laver", "released"]
ARMS: tuple[Arm, ...] = ("lm", "laver", "released")

TRAINABLE = ("connector.*", "language_model.*")
"""Stage 2's, of which an LM-only run has these; LaVer adds its own two."""
LAVER_TRAINABLE = (*TRAINABLE, "mask_token", "vision_head.*")

MOMENTUM = 0.95
"""The teacher's, in every move."""
MOVES_EVERY = 2
"""Iterations from move to move; see `iteration`."""

# google/siglip-so400m-patch14-384's vision half: 27 layers, 27 x 27 tokens of width 1152.
SIGLIP_SO400M: dict[str, Any] = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Model, batches, precision and recipe of one measurement; sizes in tokens and rows."""

    model: str
    """Preset of `laver_mcore.config.presets`."""
    num_layers: int | None = None
    """Decoder layers; the preset's where not given."""
    hidden_size: int | None = None
    """Width; where given, the shape follows from it: heads of 64, two key/value heads, inner width 4 x."""
    vocab_size: int = 4096
    """Vocabulary where the preset has none."""
    vision: Literal["encoder-free", "siglip"] = "encoder-free"
    """Bare patches, or a frozen SigLIP so400m tower with random weights."""
    vision_layers: int = 27
    """Layers of the tower; fewer for a quick look."""
    image_side: int = 16
    """Visual tokens along each side of an image without an encoder."""
    patch_size: int = 14
    """Pixels along each side of a patch without an encoder."""
    text_tokens: int = 300
    """Mean text tokens of a sample; lengths are uniform between half and one and a half of it."""
    supervised_share: float = 0.6
    """Share of the text tokens that are answers."""
    seq_length: int = 2048
    micro_batch_size: int = 1
    global_batch_size: int = 2
    num_batches: int = 2
    """Different global batches that the steps go through in turn."""
    recompute: Literal["none", "full"] = "none"
    """Keep all activations, or recompute whole layers."""
    optimizer: Literal["adam", "distributed"] = "adam"
    """The engine's optimizer; the released recipe has torch's AdamW, fused on a GPU."""
    bf16: bool = False
    teacher_precision: Literal["same", "fp8"] = "same"
    """The teacher of this engine's LaVer arm; with fp8 both of this engine's arms take Megatron's local layers."""
    mask_ratio: float = 0.05
    vision_head_hidden_size: int = 2048
    learning_rate: float = 2e-5
    seed: int = 1234
    perturb: Literal["lm", "laver", "released"] | None = None
    """Spoil one weight of this arm, to see that nothing is timed then."""
    vision_path: tyro.conf.Suppress[str | None] = None
    """Folder with the tower's config.json, written by `with_tower`."""

    @property
    def num_visual(self) -> int:
        """Visual tokens of an image."""
        side = 384 // 14 if self.vision == "siglip" else self.image_side
        return side * side

    def check(self) -> None:
        """Raise `ConfigError` for sizes that do not go together."""
        longest = self.num_visual + self.text_tokens + self.text_tokens // 2
        if longest > self.seq_length:
            raise ConfigError(
                f"seq_length={self.seq_length}, but a sample has up to {longest} tokens; use {longest} or more"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is no multiple of "
                f"micro_batch_size={self.micro_batch_size}; use {self.micro_batch_size} or a multiple"
            )
        if self.text_tokens < 4:
            raise ConfigError(f"text_tokens={self.text_tokens}; use 4 or more")


def preset(model: str, cuda: bool) -> Setting:
    """The defaults that go with a model: seconds on a CPU for `tiny`, stage 2's data and tower for the others."""
    if model in PRESETS and PRESETS[model]["family"] != "qwen2":
        raise ConfigError(
            f"model={model}: the released code that is measured beside it has Qwen2.5 decoders alone"
        )
    if not model.startswith("qwen"):
        return Setting(
            model=model, image_side=8, patch_size=4, text_tokens=30, seq_length=256, micro_batch_size=2,
            global_batch_size=4, vocab_size=512, vision_head_hidden_size=256,
            bf16=cuda,
        )  # fmt: skip
    return Setting(model=model, vision="siglip", micro_batch_size=4, global_batch_size=8, bf16=cuda)


def with_tower(setting: Setting, folder: Path) -> Setting:
    """The same setting with its tower's config written to `folder`, where it has a tower."""
    if setting.vision == "encoder-free":
        return setting
    tower = {**SIGLIP_SO400M, "num_hidden_layers": setting.vision_layers}
    (folder / "config.json").write_text(json.dumps(tower), encoding="utf-8")
    return replace(setting, vision_path=str(folder))


def iteration(number: int, move_teacher: bool) -> int:
    """The run's iteration that stands for step `number`: one after which the teacher moves, or not."""
    return MOVES_EVERY * (number + 1) + (MOVES_EVERY - 1 if move_teacher else 0)


def laver_settings(config: Config) -> LaverConfig:
    """The recipe's section of LaVer."""
    assert isinstance(config.objective, LaverConfig)
    return config.objective


def engine_config(setting: Setting, laver: bool) -> Config:
    """The recipe of an arm of this engine, checked; the released arm reads its shapes from the same."""
    widths: dict[str, Any] = {}
    if setting.hidden_size is not None:
        heads = setting.hidden_size // 64
        widths = dict(
            hidden_size=setting.hidden_size,
            ffn_hidden_size=4 * setting.hidden_size,
            num_attention_heads=heads,
            num_query_groups=2,
        )
    preset_vocabulary = None if setting.model.startswith("qwen") else setting.vocab_size
    return resolve(
        Config(
            model=ModelConfig(
                model=setting.model,
                num_layers=setting.num_layers,
                vocab_size=preset_vocabulary,
                mrope_split="contiguous",  # the released recipe's
                **widths,
            ),
            vision=VisionConfig(
                vision=setting.vision,
                vision_path=setting.vision_path,
                vision_random_init=True,
                image_size=setting.image_side * setting.patch_size,
                patch_size=setting.patch_size,
            ),
            objective=LaverConfig(
                mask_ratio=setting.mask_ratio,
                mask_strategy="constant",
                momentum=MOMENTUM,
                momentum_strategy="constant",
                ema_steps=MOVES_EVERY,
                teacher_precision=setting.teacher_precision,
                vision_head_hidden_size=setting.vision_head_hidden_size,
            )
            if laver
            else ObjectiveConfig(),
            data=DataConfig(
                data_path=("synthetic",), tokenizer_model="synthetic", seq_length=setting.seq_length
            ),
            parallel=ParallelConfig(
                recompute_granularity="full" if setting.recompute == "full" else None,
                use_distributed_optimizer=setting.optimizer == "distributed",
            ),
            optimizer=OptimizerConfig(lr=setting.learning_rate, lr_decay_style="constant"),
            train=TrainConfig(
                micro_batch_size=setting.micro_batch_size,
                global_batch_size=setting.global_batch_size,
                bf16=setting.bf16,
                transformer_impl="local" if setting.teacher_precision == "fp8" else "auto",
                seed=setting.seed,
                train_iters=1,  # every step is one of the schedules' end
                trainable=LAVER_TRAINABLE if laver else TRAINABLE,
            ),
            run=RunConfig(tensorboard=False),
        )
    )


def vocabulary(config: Config) -> int:
    """The vocabulary of the preset or of the setting."""
    assert config.model.vocab_size is not None
    return config.model.vocab_size
