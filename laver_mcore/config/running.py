"""What a run writes, starts from and does at its end."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes and what it starts from."""

    save: str | None = None
    """Folder of everything the run writes: metrics.jsonl, config.yaml, tensorboard/, iter_0000100/ ..."""
    load: str | None = None
    """Folder of a run to resume exactly where its last whole checkpoint stands."""
    pretrained_checkpoint: str | None = None
    """Folder of a run whose weights to start from, at iteration 0 with a fresh optimizer (the stage before)."""
    hf_path: str | None = None
    """Hugging Face directory of a text model (Qwen2.5, Qwen3, Llama, Vicuna): the decoder's shape and weights."""
    allow_pickle: bool = False
    """Accept pickled weights in hf_path where it has no safetensors."""
    skip_to: int | None = None
    """Step (from 0) from which data is taken, past what lies between; iterations and schedules go on as they were."""
    save_frozen: bool = False
    """LoRA: checkpoints hold the decoder's frozen weights as well, which are those that the run starts from."""
    save_interval: int | None = None
    """Iterations between checkpoints; one is always written at the end."""
    async_save: bool = False
    """Go on training while a checkpoint is written; the next save, and the end, wait for it."""
    keep_last: int | None = None
    """Keep so many of the newest checkpoints and delete older ones; all by default."""
    keep_every: int | None = None
    """With keep_last, keep besides them those whose iteration is divisible by this."""
    verify_checkpoint: bool = True
    """Compare every file of a checkpoint with its checksum before loading it; off looks at names and sizes alone."""
    max_skipped: int = 10
    """Stop after so many skipped steps (gradients that are not finite) in a row; checkpoints stay as they are."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Iterations between comparisons of all weights between data-parallel ranks, by hashes; never by default."""
    check_for_spiky_loss: bool = False
    """Stop where a step's loss is 10 times the median of the last 100; each step then waits for its loss."""
    exit_interval: int | None = None
    """Stop (after saving) at the first iteration divisible by this; the schedules still span train_iters."""
    exit_signal_handler: bool = True
    """On SIGTERM, SIGUSR1, SIGHUP and Ctrl-C finish the step, save and exit with status 0, on all ranks."""
    silent_rank_timeout: float = 0.0
    """Seconds without a sign of life of a rank (stopped, frozen) after which the others name it, dump their stacks and
    leave with status 75, with which torchrun ends the job; 45 is a fair choice, 0 is never."""
    log_interval: int = 1
    """Iterations between metrics lines; the last one of a run always has its line."""
    log_format: Literal["short", "megatron"] = "short"
    """How an iteration reads on the terminal: short and aligned with the time left, or Megatron's long line."""
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
