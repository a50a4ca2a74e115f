"""The LaVer model: a Megatron `GPTModel` with a visual path before it and a vision head behind it.

One pass covers the packed dialogue and, behind it, the packed reconstruction sequence (method of arXiv 2512.06281):

    images -> encoder -> connector -> v -+--------------------------+-> dialogue rows (text, v at its places)
                                         +-> mask token where masked -> reconstruction rows
                                         +- detached ---------------> the teacher's rows
    rows -> decoder (mixed attention, 2D-RoPE) -> final norm -> LM head (supervised rows), vision head (N rows)

The teacher's rows go through the same modules with the teacher's weights, just before the student's; between pipeline
stages both travel in one tensor.

Shapes: T dialogue rows, N visual tokens, R rows of the reconstruction part, S = T + R rows of the student's pass, D
width, K latent width, V vocabulary shard.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from laver_mcore.config.objectives import reconstructs
from laver_mcore.config.schema import Config
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.connector import Connector
from laver_mcore.model.fp8 import Fp8Pass
from laver_mcore.model.image_sharing import gather_shares
from laver_mcore.model.inputs import ModelInputs
from laver_mcore.model.layer_spec import decoder_spec
from laver_mcore.model.mixed_attention import PackedLayout
from laver_mcore.model.native_encoders import NATIVE, NativeEncoder, build_native_encoder
from laver_mcore.model.vision_encoders import PatchEmbedder, VisionEncoder, build_vision_encoder
from laver_mcore.model.vision_head import VisionHead
from laver_mcore.shapes.weights import padded_vocab


@dataclass(frozen=True, kw_only=True)
class LaverOutput:
    """What the last stage hands to the objectives; hidden states are after the final norm, whole on every TP rank."""

    dialogue_TD: torch.Tensor
    student_NK: torch.Tensor | None
    teacher_NK: torch.Tensor | None
    output_weight_VD: torch.Tensor


Weights = Callable[[], AbstractContextManager[None]]
"""Context in which the modules compute with the teacher's weights."""
Part = Callable[[str], AbstractContextManager[None]]
"""Context in which a named part of the pass runs: "vision" or "teacher"."""


def unnamed(name: str) -> AbstractContextManager[None]:
    """Nobody measures the parts."""
    return nullcontext()


class LaverModel(MegatronModule):
    """One pipeline chunk of the model; which parts it holds follows from its place in the pipeline."""

    def __init__(
        self,
        config: Config,
        mcore: TransformerConfig,
        topology: Topology,
        vocab_size: int,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=mcore)
        last_chunk = vp_stage is None or vp_stage == topology.num_chunks - 1
        self.vp_stage = vp_stage
        self.pre_process = topology.on_first_stage and not vp_stage
        self.post_process = topology.on_last_stage and last_chunk
        self.share_embeddings_and_output_weights = not config.model.untie_embeddings_and_output_weights
        self.tp_group, self.cp_group, self.tp_cp_group = (
            topology.tp_group,
            topology.cp_group,
            topology.tp_cp_group,
        )
        self.model_type = ModelType.encoder_or_decoder  # asked for by Megatron's schedules
        device = torch.device(torch.cuda.current_device())
        self.fp8 = Fp8Pass() if config.laver.teacher_precision == "fp8" else None
        self.language_model = GPTModel(
            mcore,
            decoder_spec(mcore, config.train.transformer_impl, config.train.kernels, vp_stage, self.fp8),
            vocab_size=padded_vocab(vocab_size, config),
            max_sequence_length=config.data.seq_length,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="none",
            # The sequence is put together from text and images before it is scattered.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self._received: torch.Tensor | None = None
        self.vision_encoder: VisionEncoder | NativeEncoder | None = None
        kind = dict(dtype=mcore.params_dtype, device=device)
        if self.pre_process and config.vision.vision != "none":
            self._build_visual_path(config, kind)
            if reconstructs(config):
                self.mask_token = torch.nn.Parameter(torch.zeros(mcore.hidden_size, **kind))
        if self.post_process and reconstructs(config):
            self.vision_head = VisionHead(mcore.hidden_size, config.laver.vision_head_hidden_size, **kind)

    def _build_visual_path(self, config: Config, kind: dict[str, Any]) -> None:
        vision, width = config.vision, self.config.hidden_size
        hidden = vision.connector_hidden_size or width
        if vision.vision == "encoder-free":
            self.connector: torch.nn.Module = PatchEmbedder(vision.patch_size, hidden, width, **kind)
        elif vision.vision in NATIVE:
            assert vision.vision_path is not None
            self.vision_encoder = build_native_encoder(
                vision.vision,
                path=vision.vision_path,
                random_init=vision.vision_random_init,
                seed=config.train.seed,
                **kind,
            )
            self.connector = Connector(self.vision_encoder.hidden_size, hidden, width, **kind)
        else:
            self.vision_encoder = build_vision_encoder(
                vision.vision,
                path=vision.vision_path,
                random_init=vision.vision_random_init,
                layer=vision.vision_layer,
                select=vision.vision_select,
                seed=config.train.seed,
                **kind,
            )
            self.connector = Connector(self.vision_encoder.hidden_size, hidden, width, **kind)
        for module in (self.vision_encoder, self.connector):
            for parameter in module.parameters() if module is not None else ():
                parameter.shared_over_tp = True  # type: ignore[attr-defined]

    # What Megatron's schedules and gradient finalisation ask of a model.

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive the previous stage's hidden states, the teacher's rows behind the student's."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied embedding, which Megatron keeps equal on the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def decoder(self) -> torch.nn.Module:
        """The transformer block, under the name by which Megatron's schedules look for it."""
        return self.language_model.decoder

    def output_weight(self) -> torch.Tensor:
        """The LM head's weight shard [V, D], tied or not."""
        head = self.language_model.output_layer
        if head is not None:
            for hook in list(head._forward_pre_hooks.values()):
                hook(head, ())  # the module is never called, but its weight may still be on its way here
        if self.share_embeddings_and_output_weights:
            return self.language_model.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight

    def encode_images(self, pixels: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """This rank's share of pixels -> features [n, E] before the connector (patches themselves if encoder-free)."""
        if self.vision_encoder is None:
            return pixels
        if isinstance(self.vision_encoder, NativeEncoder):
            return self.vision_encoder(pixels, grids)
        return self.vision_encoder(pixels).flatten(0, 1)

    def _visual_tokens(self, inputs: ModelInputs) -> torch.Tensor:
        features = inputs.features
        if features is None:
            assert inputs.pixels is not None
            features = self.encode_images(inputs.pixels, inputs.share_grids[self.tp_cp_group.rank()])
        local_nD = self.connector(features.to(self.config.params_dtype))
        return gather_shares(local_nD, inputs.share_counts, self.tp_cp_group, self.cp_group)

    def _embed(self, inputs: ModelInputs, visual_ND: torch.Tensor | None) -> torch.Tensor:
        """Rows of the student's pass [S, D]: text, visual tokens at their places, reconstruction, padding."""
        text_TD = self.language_model.embedding.word_embeddings(inputs.tokens_T)
        if visual_ND is not None:
            text_TD = text_TD.index_copy(0, inputs.visual_rows_N, visual_ND)
        parts = [text_TD]
        if inputs.reconstruct:
            assert visual_ND is not None
            if inputs.masked_N is not None:
                visual_ND = torch.where(inputs.masked_N[:, None], self.mask_token, visual_ND)
            parts.append(visual_ND)
        return _pad_rows(torch.cat(parts), inputs.num_rows)

    def _rows(
        self, inputs: ModelInputs, visual_ND: torch.Tensor | None, *, with_teacher: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What goes through this chunk: the student's rows, and the teacher's where there are any."""
        with_teacher = with_teacher and inputs.num_reconstruction > 0
        if self.pre_process:
            rows_SD = self._embed(inputs, visual_ND)
            if not with_teacher:
                return rows_SD, None
            assert visual_ND is not None
            return rows_SD, _pad_rows(visual_ND.detach(), inputs.num_reconstruction)
        assert self._received is not None
        if not with_teacher:
            return self._received, None
        share = self.cp_group.size() * (self.tp_group.size() if self.config.sequence_parallel else 1)
        rows, teacher_rows = self._received.split(
            [inputs.num_rows // share, inputs.num_reconstruction // share]
        )
        return rows, teacher_rows

    def _decode(self, rows: torch.Tensor, packed: PackedLayout) -> torch.Tensor:
        """This chunk's layers: embedded rows [S, D], or the previous stage's [s, 1, D] -> [s, 1, D].

        s = S / CP, and / TP under sequence parallelism.
        """
        hidden = None
        if self.pre_process:
            length = len(rows) // self.cp_group.size()
            # A plain cut: its gradient is zero elsewhere, and gradients are summed over context-parallel ranks.
            rows = rows.narrow(0, self.cp_group.rank() * length, length)
            hidden = scatter_to_sequence_parallel_region(rows) if self.config.sequence_parallel else rows
            hidden = hidden[:, None]
        else:
            self.language_model.set_input_tensor([rows])
        return self.language_model.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=packed
        )

    def _whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of the last stage [S, D], the same on every tensor- and context-parallel rank."""
        hidden_SD = hidden[:, 0]
        if self.config.sequence_parallel:
            # Every TP rank computes the same losses from the same rows, so each keeps its own slice of the gradient.
            hidden_SD = gather_from_sequence_parallel_region(hidden_SD, tensor_parallel_output_grad=False)
        if self.cp_group.size() > 1:
            # Context-parallel ranks share the losses out among them, so gradients are summed.
            hidden_SD = gather_from_sequence_parallel_region(hidden_SD, group=self.cp_group)
        return hidden_SD

    def _teach(self, inputs: ModelInputs, rows: torch.Tensor) -> torch.Tensor:
        """The teacher's pass through this chunk: hidden states for the next stage, or targets [N, K] on the last."""
        assert inputs.teacher_packed is not None
        hidden = self._decode(rows, inputs.teacher_packed)
        return self.vision_head(self._whole(hidden)[: inputs.num_visual]) if self.post_process else hidden

    def forward(
        self, inputs: ModelInputs, teacher_weights: Weights | None = None, part: Part = unnamed
    ) -> torch.Tensor | LaverOutput:
        """Run this chunk: hidden states for the next stage, or the last stage's `LaverOutput`.

        With `teacher_weights` the teacher sees the images as well, where there are any.
        """
        visual_ND = None
        if self.pre_process and hasattr(self, "connector"):
            with part("vision"):
                visual_ND = self._visual_tokens(inputs)
        rows, teacher_rows = self._rows(inputs, visual_ND, with_teacher=teacher_weights is not None)
        taught = None
        if teacher_weights is not None and teacher_rows is not None:
            with part("teacher"), teacher_weights():
                taught = self._teach(inputs, teacher_rows)
        hidden = self._decode(rows, inputs.packed)
        if not self.post_process:
            return hidden if taught is None else torch.cat([hidden, taught])
        hidden_SD = self._whole(hidden)
        student_NK = None
        if inputs.reconstruct:
            start = inputs.num_dialogue
            student_NK = self.vision_head(hidden_SD[start : start + inputs.num_visual])
        return LaverOutput(
            dialogue_TD=hidden_SD[: inputs.num_dialogue],
            student_NK=student_NK,
            teacher_NK=taught,
            output_weight_VD=self.output_weight(),
        )


def _pad_rows(rows_nD: torch.Tensor, num_rows: int) -> torch.Tensor:
    return F.pad(rows_nD, (0, 0, 0, num_rows - len(rows_nD)))
