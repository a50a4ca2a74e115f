"""The model of this rank with what it was built from: all that a forward pass needs."""

from dataclasses import dataclass
from typing import Any

from laver_mcore.config.schema import Config
from laver_mcore.megatron.parallel import Topology
from laver_mcore.model.inputs import AttentionGeometry
from laver_mcore.model.parameters import unwrap
from laver_mcore.model.vision_language import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Network:
    """The model on this rank and what it was built from: all that a forward pass needs."""

    config: Config
    topology: Topology
    models: list[Any]
    """This rank's pipeline chunks; in Megatron's data-parallel wrapper while training."""
    geometry: AttentionGeometry
    vocab_size: int
    """Before padding."""

    @property
    def chunks(self) -> list[VisionLanguageModel]:
        """The chunks without a wrapper."""
        return [unwrap(model) for model in self.models]
