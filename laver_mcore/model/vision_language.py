"""The model: a Megatron `GPTModel` with a visual path before it, and whatever an objective adds to both ends.

One pass covers the packed dialogue and, where the objective reconstructs, the images once more behind it, each a
document of its own; a teacher's pass over these image rows goes just before it:

    images -> encoder -> connector -> visual tokens -> method.enter -+-> dialogue rows (text, visual tokens in place)
                                                                     +-> image rows, the student's and the teacher's
                                                                     +-> rows that travel on to the last stage
    rows -> decoder (mixed attention, 2D positions; outputs of some layers travel on) -> final norm -> `ModelOutput`

Between pipeline stages all of them go in one tensor: the student's rows, the teacher's, and what travels.

Shapes: T dialogue rows, N visual tokens, R image rows (N and padding), S = T + R rows of the student's pass, D width,
K latent width, V vocabulary shard.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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

from laver_mcore.config.schema import Config
from laver_mcore.megatron.parallel import Topology
from laver_mcore.megatron.segments import run_segments
from laver_mcore.model.fp8 import Fp8Pass
from laver_mcore.model.image_sharing import gather_shares
from laver_mcore.model.inputs import ModelInputs
from laver_mcore.model.layer_spec import decoder_spec
from laver_mcore.model.lora import without_dropout
from laver_mcore.model.method import Added, Entering, Method, ModelOutput, Plain
from laver_mcore.model.mixed_attention import PackedLayout
from laver_mcore.model.native_encoders import NativeEncoder
from laver_mcore.model.vision_encoders import VisionEncoder
from laver_mcore.model.visual_path import build_visual_path
from laver_mcore.shapes.weights import padded_vocab

Part = Callable[[str], AbstractContextManager[None]]
"""Context in which a named part of the pass runs: "vision" or "teacher"."""


def unnamed(name: str) -> AbstractContextManager[None]:
    """Nobody measures the parts."""
    return nullcontext()


PLAIN = Plain()


class VisionLanguageModel(MegatronModule):
    """One pipeline chunk of the model; which parts it holds follows from its place in the pipeline."""

    def __init__(
        self,
        config: Config,
        mcore: TransformerConfig,
        topology: Topology,
        vocab_size: int,
        vp_stage: int | None = None,
        added: Callable[..., Added] | None = None,
    ) -> None:
        """`added(config, place, dtype=, device=)` gives what an objective adds to the "first" or "last" stage."""
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
        teacher = config.objective.teacher(config)
        self.fp8 = Fp8Pass() if teacher is not None and teacher.precision == "fp8" else None
        self.language_model = GPTModel(
            mcore,
            decoder_spec(
                mcore, config.train.transformer_impl, config.train.kernels, vp_stage, self.fp8, config.model
            ),
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
        self._normalizes = bool(config.vision.normalize_visual_tokens)
        self.vision_encoder: VisionEncoder | NativeEncoder | None = None
        kind = dict(dtype=mcore.params_dtype, device=device)
        if self.pre_process and config.vision.has_images:
            self.vision_encoder, self.connector = build_visual_path(config, **kind)
        if added is not None:
            for place, here in (("first", self.pre_process), ("last", self.post_process)):
                for name, item in added(config, place, **kind).items() if here else ():
                    setattr(self, name, item)

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

    def visual_tokens(self, inputs: ModelInputs) -> torch.Tensor | None:
        """Visual tokens [N, D] of all images; None on later stages, and without a visual path."""
        if not (self.pre_process and hasattr(self, "connector")):
            return None
        features = inputs.features
        if features is None:
            assert inputs.pixels is not None
            features = self.encode_images(inputs.pixels, inputs.share_grids[self.tp_cp_group.rank()])
        local_nD = self.connector(features.to(self.config.params_dtype))
        if self._normalizes:
            local_nD = F.normalize(local_nD.float(), dim=-1).to(local_nD.dtype)
        return gather_shares(local_nD, inputs.share_counts, self.tp_cp_group, self.cp_group)

    def _embed(self, inputs: ModelInputs, entering: Entering | None) -> torch.Tensor:
        """Rows of the student's pass [S, D]: text, visual tokens at their places, image rows, padding."""
        rows_SD = self.language_model.embedding.word_embeddings(inputs.tokens_T)
        if entering is not None:
            rows_SD = rows_SD.index_copy(0, inputs.visual_rows_N, entering.dialogue_ND)
            if inputs.reconstruct:
                assert entering.images_ND is not None
                rows_SD = torch.cat([rows_SD, entering.images_ND])
        return _pad_rows(rows_SD, inputs.num_rows)

    def _rows(
        self, inputs: ModelInputs, entering: Entering | None, *, with_teacher: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """What goes through this chunk: the student's rows, the teacher's if any, and what passes it by."""
        if self.pre_process:
            if entering is None:
                return self._embed(inputs, None), None, []
            taught = None
            if with_teacher:
                assert entering.taught_ND is not None
                taught = _pad_rows(entering.taught_ND, inputs.num_reconstruction)
            travelling = [
                self._share(_pad_rows(rows, inputs.travelling_rows)) for rows in entering.travelling
            ]
            for _ in range(len(inputs.travelling) - len(travelling)):  # places for what layers will put out
                blank = entering.dialogue_ND.new_zeros(inputs.travelling_rows, entering.dialogue_ND.shape[1])
                travelling.append(self._share(blank))
            return self._embed(inputs, entering), taught, travelling
        assert self._received is not None
        share = self.cp_group.size() * (self.tp_group.size() if self.config.sequence_parallel else 1)
        lengths = [inputs.num_rows, inputs.num_reconstruction * with_teacher, *inputs.travelling]
        student, teacher, *travelling = self._received.split([length // share for length in lengths])
        return student, teacher if with_teacher else None, travelling

    def _share(self, rows_SD: torch.Tensor) -> torch.Tensor:
        """This rank's part of whole rows: [S, D] -> [s, 1, D], s = S / CP, and / TP under sequence parallelism."""
        length = len(rows_SD) // self.cp_group.size()
        # A plain cut: its gradient is zero elsewhere, and gradients are summed over context-parallel ranks.
        rows = rows_SD.narrow(0, self.cp_group.rank() * length, length)
        return (scatter_to_sequence_parallel_region(rows) if self.config.sequence_parallel else rows)[:, None]

    def _decode(
        self, rows: torch.Tensor, packed: PackedLayout, stops: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """This chunk's layers: embedded rows [S, D], or the previous stage's [s, 1, D] -> [s, 1, D].

        The last entry is what leaves the chunk; before it, what leaves the first `stops` layers of it.
        """
        hidden = None
        if self.pre_process:
            hidden = self._share(rows)
            if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
                hidden.requires_grad_()  # recomputed layers whose input has no gradient would give their weights none
        else:
            self.language_model.set_input_tensor([rows])
        return run_segments(
            self.language_model.decoder, hidden, stops, attention_mask=None, packed_seq_params=packed
        )

    def whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of a pass [S, D], the same on every tensor- and context-parallel rank."""
        hidden_SD = hidden[:, 0]
        if self.config.sequence_parallel:
            # Every TP rank computes the same losses from the same rows, so each keeps its own slice of the gradient.
            hidden_SD = gather_from_sequence_parallel_region(hidden_SD, tensor_parallel_output_grad=False)
        if self.cp_group.size() > 1:
            # Context-parallel ranks share the losses out among them, so gradients are summed.
            hidden_SD = gather_from_sequence_parallel_region(hidden_SD, group=self.cp_group)
        return hidden_SD

    def _teach(self, inputs: ModelInputs, rows: torch.Tensor, method: Method) -> torch.Tensor:
        """The teacher's pass through this chunk: hidden states for the next stage, or targets [N, K] on the last."""
        assert inputs.teacher_packed is not None
        (hidden,) = self._decode(rows, inputs.teacher_packed)
        return method.target(self.whole(hidden)[: inputs.num_visual]) if self.post_process else hidden

    def _tapped(self, inputs: ModelInputs, hidden: torch.Tensor) -> torch.Tensor:
        """The dialogue's visual rows of a layer's output, ready to travel."""
        visual_ND = self.whole(hidden).index_select(0, inputs.visual_rows_N)
        return self._share(_pad_rows(visual_ND, inputs.travelling_rows))

    def forward(
        self,
        inputs: ModelInputs,
        method: Method = PLAIN,
        plan: Any = None,
        part: Part = unnamed,
        visual_ND: torch.Tensor | None = None,
    ) -> torch.Tensor | ModelOutput:
        """Run this chunk: hidden states for the next stage, or the last stage's `ModelOutput`.

        `plan` is what `method` has decided for this micro-batch. `visual_ND` saves encoding the images, where somebody
        has done so already.
        """
        if visual_ND is None:
            with part("vision"):
                visual_ND = self.visual_tokens(inputs)
        entering = None if visual_ND is None else method.enter(visual_ND, plan)
        teaches = method.teacher is not None and inputs.num_reconstruction > 0
        rows, teacher_rows, travelling = self._rows(inputs, entering, with_teacher=teaches)
        taught = None
        if method.teacher is not None and teacher_rows is not None:
            with part("teacher"), method.teacher.weights(), without_dropout(self):
                taught = self._teach(inputs, teacher_rows, method)
        places = self._taps_here(method, len(travelling))
        *tapped, hidden = self._decode(rows, inputs.packed, [stop for _, stop in places])
        for (place, _), output in zip(places, tapped, strict=True):
            travelling[place] = self._tapped(inputs, output)
        if not self.post_process:
            parts = [hidden, *([] if taught is None else [taught]), *travelling]
            return torch.cat(parts) if len(parts) > 1 else hidden
        return self._output(inputs, hidden, taught, travelling)

    def _taps_here(self, method: Method, num_travelling: int) -> list[tuple[int, int]]:
        """(place among what travels, number of this chunk's layers up to it) of each tap of this chunk."""
        layers: Any = self.decoder.layers
        above = [(place, tap - layers[0].layer_number + 1) for place, tap in enumerate(method.taps)]
        behind = num_travelling - len(method.taps)
        return [(behind + place, stop) for place, stop in above if 0 < stop <= len(layers)]

    def _output(
        self,
        inputs: ModelInputs,
        hidden: torch.Tensor,
        taught: torch.Tensor | None,
        travelling: Sequence[torch.Tensor],
    ) -> ModelOutput:
        hidden_SD, start = self.whole(hidden), inputs.num_dialogue
        return ModelOutput(
            dialogue_TD=hidden_SD[:start],
            images_ND=hidden_SD[start : start + inputs.num_visual] if inputs.reconstruct else None,
            target_NK=taught,
            travelling=tuple(self.whole(rows)[: inputs.num_visual] for rows in travelling),
            output_weight_VD=self.output_weight(),
        )


def _pad_rows(rows_nD: torch.Tensor, num_rows: int) -> torch.Tensor:
    return F.pad(rows_nD, (0, 0, 0, num_rows - len(rows_nD)))
