"""Pipeline stages that know how many rows each micro-batch has, and so need not tell each other.

Without it a stage sends three numbers before every tensor, and the host waits for the device until they have come.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

Shape = list[int]


class KnownShapes(P2PCommunicator):
    """Shapes by micro-batch, for one pass of the schedule: activations come in this order, and so do gradients."""

    def __init__(self, config: TransformerConfig, shapes: Sequence[Shape]) -> None:
        super().__init__(pp_group=mpu.get_pipeline_model_parallel_group(), config=config)
        self._activations, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """Those of what comes from the stage before and from the one behind."""
        return (
            next(self._activations) if recv_prev else [0, 0, 0],
            next(self._gradients) if recv_next else [0, 0, 0],
        )


def known_shapes(config: TransformerConfig, rows: Sequence[int]) -> dict[str, Any]:
    """Arguments of the schedule without interleaving for micro-batches of so many rows, its groups among them."""
    shares = config.context_parallel_size * (
        config.tensor_model_parallel_size if config.sequence_parallel else 1
    )
    groups = ProcessGroupCollection()
    groups.tp = mpu.get_tensor_model_parallel_group()
    groups.pp = mpu.get_pipeline_model_parallel_group()
    groups.cp = mpu.get_context_parallel_group()
    groups.embd = mpu.get_embedding_group(check_initialized=False)
    groups.pos_embd = mpu.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = mpu.get_data_parallel_group(with_context_parallel=True)
    shapes = [[count // shares, 1, config.hidden_size] for count in rows]
    return dict(p2p_communicator=KnownShapes(config, shapes), pg_collection=groups)
