"""The teacher's products in fp8 on a GPU: the codes of the CPU, and its products but for one rounding to bf16."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with fp8"
    ),
]

# M, N, K: what a decoder of 0.5B and of 7B has, few rows, and numbers of rows that no tile divides.
SHAPES = {"small": (16, 32, 64), "half_billion": (729, 1152, 896), "seven_billion": (1458, 4608, 3584)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product_is_that_of_the_cpu(shape):
    from laver_mcore.model.fp8 import multiply, quantize_rows

    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(m, k, generator=generator) ** 3).bfloat16()
    rows[0] = 0
    weight = (0.02 * torch.randn(n, k, generator=generator)).bfloat16()
    pairs = [quantize_rows(x) for x in (rows, weight)]
    on_gpu = [quantize_rows(x.cuda()) for x in (rows, weight)]
    for (codes, scales), (gpu_codes, gpu_scales) in zip(pairs, on_gpu, strict=True):
        assert torch.equal(scales, gpu_scales.cpu())
        assert torch.equal(codes.view(torch.uint8), gpu_codes.cpu().view(torch.uint8))
    got, wanted = multiply(*on_gpu, torch.bfloat16).cpu().double(), multiply(*pairs, torch.float32).double()
    size = (pairs[0][0].double() * pairs[0][1]).abs() @ (pairs[1][0].double() * pairs[1][1]).abs().t()
    # Tensor cores add e4m3 products in fewer bits than fp32 has: 2^-13 of the sum of magnitudes.
    assert ((got - wanted).abs() <= 2.0**-9 * wanted.abs() + 2.0**-13 * size).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(bad):
    from laver_mcore.model.fp8 import multiply, quantize_rows

    rows, weight = (torch.ones(n, 64, dtype=torch.bfloat16, device="cuda") for n in (5, 32))
    rows[1, 5] = bad
    got = multiply(quantize_rows(rows), quantize_rows(weight), torch.bfloat16)
    assert got.isnan().any(-1).tolist() == [False, True, False, False, False]
    assert (got[0] == 64).all()
