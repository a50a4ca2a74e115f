"""Process groups -> a frozen `Topology`, read once and passed to whoever needs to know where it runs."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.schema import ParallelConfig
from laver_mcore.megatron import cpu
from laver_mcore.megatron.devices import DeviceFacts, check_devices
from laver_mcore.megatron.environment import check_environment
from laver_mcore.megatron.rendezvous import fresh_part
from laver_mcore.processes import end_with_torchrun


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this process stands: ranks, sizes and groups of every parallel dimension, and its device."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int | None
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    mp_group: dist.ProcessGroup
    """Tensor x pipeline: the ranks that together hold each weight once."""
    tp_cp_group: dist.ProcessGroup
    """Ranks of one pipeline stage that hold the same batches, and share out their images."""
    dp_cp_group: dist.ProcessGroup
    """Ranks that hold the same weights and sum their gradients."""
    replica_group: dist.ProcessGroup
    """All ranks that hold the same batches: tensor x context x pipeline."""
    device: torch.device

    @property
    def num_shares(self) -> int:
        """Ranks of the first stage among which a micro-batch's images are shared out."""
        return self.tp_cp_group.size()

    @property
    def share(self) -> int:
        """Which share of the images is this rank's."""
        return self.tp_cp_group.rank()

    @property
    def speaks_for_samples(self) -> bool:
        """Whether this rank, of all that hold the same batches, names their samples."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def num_chunks(self) -> int:
        """Model chunks held by this rank (more than one under the interleaved schedule)."""
        return self.vp_size or 1

    @property
    def on_first_stage(self) -> bool:
        """Whether this rank holds the embedding and the vision encoder (always in its first chunk)."""
        return self.pp_rank == 0

    @property
    def on_last_stage(self) -> bool:
        """Whether this rank holds the heads and computes the losses (always in its last chunk)."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_last_rank(self) -> bool:
        """The rank that reports, as in Megatron: the last one, which sees the losses."""
        return self.rank == self.world_size - 1


def init_distributed(timeout_minutes: int = 30) -> torch.device:
    """Join the process group that torchrun describes (or a group of one) and return this rank's device.

    ConfigError names a variable of the environment that fits no group, and a port that is taken.
    """
    check_environment()
    end_with_torchrun()  # for programs that do not start by `console.run_and_leave`
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    check_devices(int(os.environ["LOCAL_RANK"]), DeviceFacts.found())
    torch.backends.cudnn.allow_tf32 = False  # convolutions alone have it on: fp32 is to mean fp32
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        cpu.install()
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout = timedelta(minutes=timeout_minutes)
        try:
            dist.init_process_group(
                backend,
                store=_store(rank, world_size, timeout),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
        except dist.DistNetworkError as error:
            port, reason = os.environ.get("MASTER_PORT"), str(error).split("\n")[0]
            raise ConfigError(f"MASTER_PORT={port} cannot be used ({reason}); choose another") from None
    return device


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """Where the ranks meet; None for a port that the environment names, without torchrun."""
    if "MASTER_PORT" not in os.environ:  # a single process
        return dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    return fresh_part(store, rank, world_size, timeout)


def build_topology(config: ParallelConfig, device: torch.device) -> Topology:
    """Create Megatron's process groups for `config` over the current world."""
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=config.context_parallel_size,
        create_gloo_process_groups=device.type != "meta",  # a pretended world has nobody to connect to
    )
    if device.type == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1234, force_reset_rng=True)  # dropout streams; weights have their own
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        vp_size=config.num_virtual_stages_per_pipeline_rank,
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        mp_group=mpu.get_model_parallel_group(),
        tp_cp_group=mpu.get_tensor_and_context_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        replica_group=_replica_group(config),
        device=device,
    )


def _replica_group(config: ParallelConfig) -> dist.ProcessGroup:
    """The ranks with this rank's batches; Megatron's own model-parallel group leaves context parallelism out."""
    if config.context_parallel_size == 1:
        return mpu.get_model_parallel_group()
    stage = config.tensor_model_parallel_size * config.context_parallel_size
    dp_size = mpu.get_data_parallel_world_size()
    # Megatron counts ranks through tensor, context, data and pipeline dimensions, in this order.
    replicas = [
        [rank for rank in range(dist.get_world_size()) if rank // stage % dp_size == replica]
        for replica in range(dp_size)
    ]
    group, _ = dist.new_subgroups_by_enumeration(replicas)
    assert group is not None
    return group


def forget_groups() -> None:
    """Close the groups of a topology that is no longer needed; the world's own stays.

    Megatron leaves them behind, and each keeps three threads that wake up a hundred times a second.
    """
    for group in (mpu._global_process_group_list or [None])[1:]:
        dist.destroy_process_group(group)
    mpu.destroy_model_parallel()
    gc.collect()


def shut_down() -> None:
    """Leave the process groups; safe to call when none was joined."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
