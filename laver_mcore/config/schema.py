"""The typed configuration; a recipe's YAML has one mapping per section below, the command line is flat.

`objective` is the exception: a recipe names one, `objective: laver`, and its settings stand in a section of that name.

Flags carry Megatron's names where Megatron has the thing. Every field's docstring is its `--help` text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from laver_mcore.config.architecture import AttentionConfig as AttentionConfig
from laver_mcore.config.architecture import ModelConfig as ModelConfig
from laver_mcore.config.architecture import VisionConfig as VisionConfig
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.running import RunConfig as RunConfig
from laver_mcore.config.targets import TargetEncoder
from laver_mcore.config.validation import ValidationConfig as ValidationConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Dialogues with images from JSON, JSONL, parquet or prepared shards, packed to `seq_length`."""

    data_path: tuple[str, ...] = ()
    """One or several sets: JSON or JSONL file, parquet file or folder, or folder of laver prepare."""
    data_weights: tuple[float, ...] = ()
    """Share of each set in an epoch, 1 being the whole set once; one a set, or none for all of everything."""
    image_folder: str | None = None
    """Folder that image paths are relative to; the JSON file's own folder where not given."""
    allow_outside_images: bool = False
    """Whether a JSON record may name images outside image_folder, by .. or an absolute path."""
    image_backend: Literal["pillow", "torch_uint8", "dali", "dali_two_pass"] = "pillow"
    """Who decodes and resizes: pillow is the reference, torch_uint8 fastest on CPU, dali uses the run's GPU if any."""
    num_workers: int = 0
    """Processes that read and tokenise ahead (and decode, with image_backend=pillow); 0 does it in a thread."""
    worker_timeout: float = 30.0
    """Seconds a worker process may spend on one sample before it is replaced; twice, and the sample is left out."""
    decode_threads: int = 2
    """Threads of the other image backends."""
    max_bad_fraction: float = 0.1
    """Share of unreadable samples above which a run stops; below, they are listed in quarantine.jsonl."""
    index_folder: str | None = None
    """Where the measured lengths of large sets are kept; `.laver_index` beside the data where not given."""
    tokenizer_model: str | None = None
    """Hugging Face tokenizer directory, or a SentencePiece .model file."""
    chat_template: str | None = None
    """How dialogues are written: chatml, vicuna, llama2, llama3, or a Jinja file; the tokenizer's own if not given."""
    seq_length: int = 2048
    """Tokens of one packed row; no dialogue may be longer."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a dialogue longer than seq_length; truncate leaves whole turns at its end out."""
    min_relevance: int | None = None
    """FineVision parquet: questions rated below this (1 to 5) are left out; prepared shards had their own filter."""
    min_visual_dependency: int | None = None
    """The same for how much a question needs its image."""
    min_image_correspondence: int | None = None
    """The same for how well a question fits its image."""
    min_formatting: int | None = None
    """The same for the form of the answer."""
    packing: bool = True
    """Several dialogues in a row; without, one, so that batch sizes and iterations count dialogues, as in papers."""
    packing_window: int = 1024
    """Dialogues looked ahead at when rows are packed: more fill better and even out cost, and stray further."""
    system_prompt: str = "You are a helpful assistant."
    """System turn of dialogues that bring none; empty for none at all."""
    pad_to_multiple: int = 128
    """The reconstruction sequence is padded so that a micro-batch's length is a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks per pipeline rank: the interleaved schedule."""
    context_parallel_size: int = 1
    """Ranks that share each sequence between them (Ulysses): its rows, and inside attention its heads."""
    sequence_parallel: bool = False
    """Also share norms and residuals along the sequence, over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and fp32 masters over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is running."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass is running."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute attention (selective) or whole layers (full) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Full recompute: every recompute_num_layers layers, or only the first ones of a stage."""
    recompute_num_layers: int | None = None
    """Full recompute: number of layers of one unit (uniform) or of the stage (block)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with decoupled weight decay and its learning-rate schedule."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """Adam's first-moment decay."""
    adam_beta2: float = 0.999
    """Adam's second-moment decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    lr_mult: tuple[str, ...] = ()
    """Learning rates of their own: PATTERN=FACTOR by parameter name, e.g. connector.*=10; the last match wins."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: batch, length, precision, what trains, kernels."""

    train_iters: int = 1000
    """Iterations of the whole run, those before a resume included."""
    micro_batch_size: int = 1
    """Packed rows of one forward pass on one data-parallel rank."""
    global_batch_size: int = 128
    """Packed rows of one optimizer step over all ranks."""
    bf16: bool = False
    """Train in bfloat16 with fp32 masters and gradients; fp32 otherwise."""
    seed: int = 1234
    """Seed of weights, data order and masks."""
    trainable: tuple[str, ...] = ("*",)
    """Name patterns of what trains, e.g. connector.* language_model.* objective (what it adds); all else is frozen."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of mixed attention and losses."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of Transformer Engine, or Megatron's local ones; auto takes Transformer Engine in bf16 where installed."""


@dataclass(frozen=True, kw_only=True)
class AddedWeight:
    """A parameter that an objective adds to the model, whole, under its global name."""

    name: str
    shape: tuple[int, ...]
    place: Literal["first", "last"]
    """Pipeline stage that holds it: where visual tokens enter, or where final states come out."""
    std: float | None = None
    """Standard deviation of its random start; the decoder's rules by name where not given."""
    uses: int = 0
    """How often each visual token of a pass is multiplied with it; 0 for what is no matrix."""
    decays: bool = True
    """Whether weight decay reaches it; biases and other vectors have none in any case."""
    lazy: bool = False
    """Whether elements without gradient in a step stay where they are, whatever their moments (`megatron/lazy.py`)."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Weights that the model also computes with: an average, or a snapshot that never moves."""

    averaged: tuple[str, ...]
    """Prefixes of the names of the parameters that it has of its own; it shares the rest."""
    moves_every: int | None
    """Iterations between two of its moves; None where it never moves."""
    precision: Literal["same", "fp8"] = "same"
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Settings of an objective: its section of the recipe, and what has to be known of it before anything is built.

    This one is the language model's loss alone, which has no settings and adds nothing. A child says what differs.
    """

    name: ClassVar[str] = "lm"
    """By which `--objective` finds it; its section is called the same."""
    reconstructs: ClassVar[bool] = False
    """Whether the images of a micro-batch go through the decoder once more, by themselves."""
    needs_images: ClassVar[bool] = False
    """Whether it has nothing to learn from without a visual path; what reconstructs needs one in any case."""
    normalizes: ClassVar[bool] = False
    """Whether it wants visual tokens of unit length, in its own stage and in all others."""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Settings that a resumed run may change."""

    def check(self, config: "Config") -> None:
        """Raise `ConfigError` for settings that cannot run in this recipe."""
        if (self.needs_images or self.reconstructs) and not config.vision.has_images:
            raise ConfigError(f"objective={self.name} needs a visual path; set vision, or objective=lm")

    def parameters(self, config: "Config") -> tuple[AddedWeight, ...]:
        """Parameters that it adds to the model."""
        return ()

    def teacher(self, config: "Config") -> TeacherSpec | None:
        """Other weights that the model computes with beside its own, if any."""
        return None

    def travelling(self) -> int:
        """Rows that travel on to the last pipeline stage beside the decoder's, for each visual token."""
        return 0

    def target_encoder(self) -> TargetEncoder | None:
        """A frozen encoder that gives targets, or a cache of them: what `Batch.targets` is made with, if any."""
        return None

    def gram_pairs(self, image_lengths: Sequence[int]) -> int:
        """Products of two visual tokens' features that it takes, of student and teacher each."""
        return 0

    def masked_share(self) -> float:
        """Share of visual tokens that the model does not see, at its largest."""
        return 0.0

    def mask(self, config: "Config", num_tokens: int, *, key: str, image_index: int, iteration: int) -> Any:
        """Which tokens of one image the model does not see at `iteration` (from 0), bool; None where it sees all."""
        return None

    def remarks(self, config: "Config", image_tokens: int) -> tuple[str, ...]:
        """Lines for the start of a run whose images have about so many visual tokens."""
        return ()

    def saved_per_visual_token(self, config: "Config") -> int:
        """Numbers that the last stage saves for the backward of its losses, for each visual token."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=RunConfig)
