"""A step's batches on their way to the GPU while the step before is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from laver_mcore.data.sequence.batch import Batch
from laver_mcore.device import send


def send_batch(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors sent to `device`; pixels of a GPU backend are there already."""
    moved = {name: send(tensor, device) for name, tensor in batch.tensors().items()}
    return replace(batch, **moved)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Batches whose copies were begun; `event` comes when they are complete."""

    batches: list[Batch]
    event: torch.cuda.Event


class DeviceCopies:
    """Copies through page-locked memory on a stream of its own.

    A batch's layout stays on the host: the model lays it beside the reconstruction sequence before it is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, batches: Sequence[Batch]) -> Sent:
        """Begin to copy; called in a background thread, which does not wait for it."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = [send_batch(batch, self._device) for batch in batches]
            event = torch.cuda.Event()
            event.record(self._stream)
        return Sent(batches=moved, event=event)

    def receive(self, sent: Sent) -> list[Batch]:
        """The batches, for use on the caller's current stream, which waits for the copies; the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent.event)
        for batch in sent.batches:
            for tensor in batch.tensors().values():
                tensor.record_stream(current)  # not to be reused for a later copy before this stream is done
        return sent.batches
