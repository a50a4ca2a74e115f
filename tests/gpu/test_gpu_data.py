"""DALI on the GPU against Pillow, one damaged image among others, and copies that run beside the step."""

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "data"))

from corpora import encode, hard_pictures, picture
from processors import PROCESSORS, build_processor
from sample_run import write_recipe, write_sample_data

from laver_mcore.data.images.backends import make_backend
from laver_mcore.data.images.decode import encoded_size
from laver_mcore.data.images.processors import PatchImageProcessor
from laver_mcore.data.images.source import LoadedImage
from laver_mcore.data.images.wanted import GREY, WantedImage
from laver_mcore.data.sequence.tokenizer import load_tokenizer
from laver_mcore.data.serve.device_copies import DeviceCopies
from laver_mcore.data.serve.loader import DialogueData

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

DEVICE = torch.device("cuda", 0)
SIZES = {"global_batch_size": 4, "micro_batch_size": 2, "image_share": (0, 1)}
# In normalised units, mean and largest: those of the CPU backends (tests/unit/data/test_backends.py), and two 8-bit
# steps more in the mean and twelve at most for JPEGs, whose inverse transform nvJPEG rounds otherwise.
BOUNDS = {"dali": (0.004, 0.15), "dali_two_pass": (0.0005, 0.06)}
STEP = 1 / 255 / 0.26  # of CLIP's smallest deviation
BACKENDS = tuple(BOUNDS)


def wanted(name, data):
    return WantedImage(LoadedImage(name, data), *encoded_size(data, name))


def maker(backend, processor):
    pytest.importorskip("nvidia.dali")
    return make_backend(backend, processor, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_agree_with_pillow(name, backend):
    processor = build_processor(name)
    on_gpu, reference = maker(backend, processor), make_backend("pillow", processor)
    for file, data in hard_pictures().items():
        pixels, failures = on_gpu([wanted(file, data)])
        expected, _ = reference([wanted(file, data)])
        assert failures == {}
        assert pixels.device == DEVICE and pixels.shape == expected.shape
        error = (pixels.cpu() - expected).abs()
        mean, largest = BOUNDS[backend]
        jpeg = file.endswith(".jpg")
        assert error.mean() < mean + 2 * STEP * jpeg, (file, error.mean())
        assert error.max() < largest + 12 * STEP * jpeg, (file, error.max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_takes_no_other_along(backend):
    on_gpu = maker(backend, build_processor("siglip"))
    good = encode(picture(50, 40))
    bad = {1: good[:200], 2: b"", 4: b"<html>404</html>", 5: encode(picture(40, 50))}
    images = [WantedImage(LoadedImage(str(i), bad.get(i, good)), 50, 40) for i in range(7)]
    pixels, failures = on_gpu(images)
    assert failures.keys() == bad.keys()
    alone, _ = on_gpu([images[0]])
    for number, image in enumerate(pixels):
        grey = torch.full_like(image, (GREY / 255 - 0.5) / 0.5)
        torch.testing.assert_close(image, grey if number in bad else alone[0], atol=1e-5, rtol=0)
    pixels, failures = on_gpu(images[:1] * 3)  # the decoder still works
    assert failures == {} and torch.equal(pixels[2], alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_image_gives_an_empty_tensor_there(backend):
    pixels, failures = maker(backend, build_processor("siglip"))([])
    assert pixels.device == DEVICE and pixels.shape == (0, 3, 384, 384) and failures == {}


def build(folder, **changes):
    settings = {
        "image_processor": PatchImageProcessor(image_size=16, patch_size=8),
        "seq_length": 256,
        "seed": 7,
    }
    settings |= {"tokenizer": load_tokenizer(folder / "tokenizer.model"), "device": DEVICE} | changes
    return DialogueData(folder / "train.json", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_data")
    write_sample_data(folder)
    write_recipe(folder)
    return folder


@pytest.mark.parametrize("backend", ["pillow", "torch_uint8", "dali"])
def test_batches_arrive_on_the_device(backend, folder):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    expected = list(build(folder, device=None).iterate(0, 6, **SIZES))
    got = list(build(folder, image_backend=backend).iterate(0, 6, **SIZES))
    for first, second in zip(expected, got, strict=True):
        for a, b in zip(first, second, strict=True):
            assert b.tokens_T.device == b.pixels.device == DEVICE
            assert b.layout.positions_3S.device.type == "cpu"
            assert torch.equal(a.tokens_T, b.tokens_T.cpu())
            assert torch.equal(a.visual_rows_N, b.visual_rows_N.cpu())
            torch.testing.assert_close(
                a.pixels, b.pixels.cpu(), atol=0.2 if backend == "dali" else 0.02, rtol=0
            )


def test_copies_run_beside_the_step(folder):
    """A copy begun behind a long kernel on the compute stream is over long before the kernel."""
    batches = build(folder, device=None).step_batches(0, **SIZES)
    copies = DeviceCopies(DEVICE)
    copies.receive(copies.send(batches))  # memory is there
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done.record()
    sent = []
    thread = threading.Thread(target=lambda: sent.append(copies.send(batches)))
    thread.start()
    thread.join()
    sent[0].event.synchronize()
    assert not done.query(), "the copy waited for the compute stream"
    for ours, theirs in zip(copies.receive(sent[0]), batches, strict=True):
        assert torch.equal(ours.tokens_T.cpu(), theirs.tokens_T)


def test_pixels_are_made_beside_the_step():
    on_gpu = maker("dali", build_processor("siglip"))
    image = wanted("a", encode(picture(640, 480)))
    on_gpu([image])
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    done.record()
    on_gpu([image] * 4)
    assert not done.query(), "decoding waited for the compute stream"
