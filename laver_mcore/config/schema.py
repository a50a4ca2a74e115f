"""The typed configuration; a recipe's YAML has one mapping per section below, the command line is flat.

Flags carry Megatron's names where Megatron has the thing. Every field's docstring is its `--help` text.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Decoder: a preset's shape; any field given here wins over the preset."""

    model: str = "qwen2.5-7b"
    """Preset: tiny, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-3b, 7b, 14b, 32b, 72b (all qwen2.5-)."""
    num_layers: int | None = None
    """Decoder layers."""
    hidden_size: int | None = None
    """Width D of the decoder."""
    ffn_hidden_size: int | None = None
    """Width of the SwiGLU MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention)."""
    kv_channels: int | None = None
    """Width of one attention head; hidden_size / num_attention_heads where not given."""
    vocab_size: int | None = None
    """Vocabulary before padding; the tokenizer's where neither preset nor recipe gives it."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    untie_embeddings_and_output_weights: bool | None = None
    """Whether the LM head has weights of its own."""
    rotary_base: float | None = None
    """Base of the rotary frequencies."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotary bands for (t, row, column), summing to half the head width; the pure 2D split where not given."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of random weights."""
    attention_dropout: float = 0.0
    """Only 0 is supported: the mixed-attention kernels have no dropout."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Visual path: a transformers tower at fixed resolution, or encoder-free patches."""

    vision: Literal["none", "encoder-free", "siglip", "clip", "dinov2", "aimv2", "qwen2-vl", "qwen2.5-vl"] = (
        "siglip"
    )
    """Kind of visual path; siglip serves fixed-resolution SigLIP2 too, none trains on text alone."""
    vision_path: str | None = None
    """Hugging Face directory with the tower's config, weights and preprocessor_config.json."""
    vision_random_init: bool = False
    """Start the tower from random weights; its directory then needs no weights."""
    vision_layer: int = -1
    """Which hidden state feeds the connector: -1 the last, -2 the one before (LLaVA's choice for CLIP)."""
    vision_select: Literal["patch", "cls_patch"] = "patch"
    """Whether a CLS token is dropped (patch) or kept."""
    image_size: int = 384
    """Side in pixels of the square input, encoder-free path only (a tower's own settings decide otherwise)."""
    patch_size: int = 16
    """Side in pixels of one patch, encoder-free path only."""
    min_pixels: int | None = None
    """Native resolution: images of fewer pixels are scaled up; preprocessor_config.json's bound where not given."""
    max_pixels: int | None = None
    """Native resolution: images of more pixels are scaled down; preprocessor_config.json's bound where not given."""
    connector_hidden_size: int | None = None
    """Inner width of the connector's MLP; the decoder's width where not given."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What a token sees, and where it stands: in every stage, whatever the objective."""

    mixed_attention: bool = True
    """Visual tokens of an image see each other both ways; off is causal."""
    rope_2d: bool = True
    """Visual tokens have (row, column) positions; off is 1D RoPE."""


@dataclass(frozen=True, kw_only=True)
class LaverConfig:
    """Latent visual reconstruction (arXiv 2512.06281), `objective: laver`: losses, teacher, schedules."""

    mask_ratio: float = 0.05
    """Share r of visual tokens masked at the decoder's input, at the end of its schedule."""
    mask_strategy: Literal["cosine", "constant"] = "cosine"
    """Schedule of the mask ratio: cosine 0 -> r, or 0 for the first 12.5 % and then r."""
    mask_draw: Literal["permutation", "bernoulli"] = "permutation"
    """Exactly floor(r N) masked tokens per image, or each with probability r."""
    momentum: float = 0.95
    """EMA momentum m of the teacher at the start of its schedule."""
    momentum_strategy: Literal["cosine", "constant"] = "cosine"
    """Schedule of the momentum: cosine m -> 1, or m throughout."""
    ema_ratio: float = 0.02
    """The teacher moves every max(1, int(train_iters * ema_ratio)) iterations."""
    ema_steps: int | None = None
    """Iterations between two moves of the teacher; wins over ema_ratio."""
    offload_teacher: bool = False
    """Keep the teacher's fp32 average in host memory; it visits the device only when the teacher moves."""
    teacher_precision: Literal["same", "fp8"] = "same"
    """The decoder's matrix products in the teacher's forward: the model's precision, or fp8 (Hopper, Ada or newer)."""
    lambda_laver: float = 1.0
    """Weight of the masked reconstruction loss (MIM)."""
    lambda_gram: float = 1.0
    """Weight of the Gram loss."""
    gram: Literal["cga", "ga", "off"] = "cga"
    """Gram loss: clipped (only similarities above the teacher's cost), symmetric, or none."""
    gram_scope: Literal["image", "micro_batch"] = "image"
    """Gram matrices per image (paper) or over all visual tokens of a micro-batch (released code)."""
    student_temperature: float = 0.1
    """Softmax temperature of the student."""
    teacher_temperature: float = 0.04
    """Softmax temperature of the teacher."""
    centering: bool = False
    """Subtract a running mean from the teacher's outputs before its softmax."""
    center_momentum: float = 0.9
    """Momentum of that running mean."""
    vision_head_hidden_size: int = 2048
    """Inner width of the 3-layer vision head."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Dialogues with images from JSON, JSONL, parquet or prepared shards, packed to `seq_length`."""

    data_path: tuple[str, ...] = ()
    """One or several sets: JSON or JSONL file, parquet file or folder, or folder of tools/prepare_data.py."""
    data_weights: tuple[float, ...] = ()
    """Share of each set in an epoch, 1 being the whole set once; one a set, or none for all of everything."""
    image_folder: str | None = None
    """Folder that image paths are relative to; the JSON file's own folder where not given."""
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
    seq_length: int = 2048
    """Tokens of one packed row; no dialogue may be longer."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with a dialogue longer than seq_length."""
    min_relevance: int | None = None
    """FineVision parquet: questions rated below this (1 to 5) are left out; prepared shards had their own filter."""
    min_visual_dependency: int | None = None
    """The same for how much a question needs its image."""
    min_image_correspondence: int | None = None
    """The same for how well a question fits its image."""
    min_formatting: int | None = None
    """The same for the form of the answer."""
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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: objective, batch, length, precision, what trains, kernels."""

    objective: str = "lm"
    """What is learned: lm (the language model's loss alone), laver, or one that an installed package registers."""
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
    """Name patterns of the parameters that train, e.g. connector.* language_model.*; all others are frozen."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Implementation of mixed attention and losses."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of Transformer Engine, or Megatron's local ones; auto takes Transformer Engine where installed."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes and what it starts from."""

    save: str | None = None
    """Folder of everything the run writes: metrics.jsonl, config.yaml, tensorboard/, iter_0000100/ ..."""
    load: str | None = None
    """Folder of a run to resume exactly where its last checkpoint stands."""
    pretrained_checkpoint: str | None = None
    """Folder of a run whose weights to start from, at iteration 0 with a fresh optimizer (the stage before)."""
    hf_path: str | None = None
    """Hugging Face directory of a Qwen2.5 text model: the decoder's shape and starting weights."""
    allow_pickle: bool = False
    """Accept pickled weights in hf_path where it has no safetensors."""
    skip_to: int | None = None
    """Step (from 0) from which data is taken, past what lies between; iterations and schedules go on as they were."""
    save_interval: int | None = None
    """Iterations between checkpoints; one is always written at the end."""
    exit_interval: int | None = None
    """Stop (after saving) at the first iteration divisible by this; the schedules still span train_iters."""
    exit_signal_handler: bool = False
    """On SIGTERM finish the step, save and exit with status 0, on all ranks; otherwise the run ends at once."""
    log_interval: int = 1
    """Iterations between metrics lines."""
    tensorboard: bool = True
    """Write DIR/tensorboard."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs `pip install wandb`)."""
    wandb_exp_name: str | None = None
    """Name of the run there."""
    peak_tflops: float | None = None
    """Peak rate of one device in TFLOP/s, which mfu and hfu are shares of; known for A100, H100, H200 and B200."""
    profile: bool = False
    """Trace some iterations with torch's profiler into DIR/profile, for TensorBoard or chrome://tracing."""
    profile_step_start: int = 10
    """First iteration of the trace."""
    profile_step_end: int = 12
    """Iteration before which the trace ends."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are traced."""
    record_memory_history: bool = False
    """With the trace, also write the history of GPU memory (for pytorch.org/memory_viz)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    laver: LaverConfig = field(default_factory=LaverConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
