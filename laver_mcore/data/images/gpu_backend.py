"""Images on a GPU: nvJPEG decodes, DALI resizes, torch normalises and cuts, all on a stream of its own.

Called from a background thread, so that the training step's stream never waits for the host. What nvJPEG does not
read, or should not (`dali.decodes`), Pillow decodes and the GPU resizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from laver_mcore.data.images import dali
from laver_mcore.data.images.processors import ImageProcessor
from laver_mcore.data.images.wanted import WantedImage, by_pillow, centre_crop, fits, read_all
from laver_mcore.device import send


class GpuPixels:
    """DALI's backends on a CUDA device; a `PixelMaker` whose pixels are there, and complete when it returns."""

    def __init__(
        self, processor: ImageProcessor, device: torch.device, *, two_pass: bool, num_threads: int
    ) -> None:
        self._processor, self._settings, self._two_pass = processor, processor.settings, two_pass
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._dali = dali.OnGpu(self._stream, num_threads)

    def __call__(self, images: Sequence[WantedImage]) -> tuple[Tensor, dict[int, str]]:
        encoded, failures = read_all(images)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            decoded = self._decode(images, encoded, failures)
            targets = [self._settings.target(image.width, image.height) for image in images]
            resized = self._dali.resize(decoded, targets, self._settings.resample, self._two_pass)
            cropped = [centre_crop(image.permute(2, 0, 1), self._settings.crop) for image in resized]
            pixels = self._processor.finish(cropped).to(self._device)
        self._stream.synchronize()  # of this thread alone; DALI's buffers are free again
        return pixels, failures

    def _decode(
        self, images: Sequence[WantedImage], encoded: Sequence[bytes], failures: dict[int, str]
    ) -> list[Tensor]:
        """uint8 [H, W, 3] on the GPU."""
        decoded = self._dali.decode(encoded)
        found = []
        for position, (image, tensor) in enumerate(zip(images, decoded, strict=True)):
            if tensor is None or not fits(image, tensor.shape):
                host = torch.from_numpy(by_pillow(image, encoded[position], position, failures))
                tensor = send(host, self._device)
            found.append(tensor)
        return found
