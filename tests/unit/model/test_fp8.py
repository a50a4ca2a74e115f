"""Matrix products in fp8: against the formula in fp64, exact where they must be, row by row."""

import math

import pytest
import torch

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse
from laver_mcore.model.fp8 import Fp8Pass, _Fp8Teacher, multiply, quantize_rows
from laver_mcore.model.layer_spec import require_fp8

# Every finite e4m3 number from its definition: 1 sign, 4 exponent bits with bias 7, 3 of mantissa; no infinities.
POSITIVE = [m * 2.0**-9 for m in range(8)]
POSITIVE += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
E4M3 = torch.tensor(POSITIVE, dtype=torch.float64)


def scale_of(row: torch.Tensor) -> float:
    """The smallest power of two that takes the row's largest magnitude to 448 or below, by trying."""
    largest, exponent = float(row.double().abs().max()), -126
    while largest > 448.0 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The e4m3 number next to each (fp64), by looking at all of them; of two the one with an even code."""
    distance = (values.abs().unsqueeze(-1) - E4M3).abs()
    even_first = torch.cat([distance[..., ::2], distance[..., 1::2]], -1).argmin(-1)
    order = torch.cat([E4M3[::2], E4M3[1::2]])
    return order[even_first].copysign(values)


def decoded(rows: torch.Tensor) -> torch.Tensor:
    """What the codes of `rows` stand for, in fp64."""
    scales = torch.tensor([[scale_of(row)] for row in rows], dtype=torch.float64)
    return nearest(rows.double() / scales) * scales


def draw(kind: str, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, width, generator=generator)
    if kind == "heavy_tails":
        return x**5
    if kind == "outlier":
        x[1, 3] = 1e4
    if kind == "rows_of_zeros":
        x[::2] = 0
    if kind == "ties":  # odd sixteenths of a binade lie between two codes
        x = (torch.randint(16, 32, x.shape, generator=generator) / 16) * x.sign()
    if kind == "uneven_rows":
        x *= torch.logspace(-20, 20, rows)[:, None]
    return x


KINDS = ["gaussian", "heavy_tails", "outlier", "rows_of_zeros", "ties", "uneven_rows"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_numbers(kind, dtype):
    rows = draw(kind, 6, 48).to(dtype)
    codes, scales = quantize_rows(rows)
    assert codes.dtype == torch.float8_e4m3fn
    assert (codes.double() * scales.double() == decoded(rows)).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_the_formula(kind, dtype):
    rows, weight = draw(kind, 6, 48).to(dtype), draw("gaussian", 16, 48).to(dtype)
    got = multiply(quantize_rows(rows), quantize_rows(weight), dtype)
    left, right = decoded(rows), decoded(weight)
    size = left.abs() @ right.abs().t()
    assert got.dtype == dtype
    # fp32 sums of 48 products; then one rounding of the result.
    allowed = 48 * 2.0**-23 * size + torch.finfo(dtype).eps / 2 * (left @ right.t()).abs()
    assert ((got.double() - left @ right.t()).abs() <= allowed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_error_stays_below_the_documented_bound(kind):
    """2^-4 of every number, or 2^-10 of its row's scale where it is small."""
    rows, weight = draw(kind, 6, 48), draw("heavy_tails", 16, 48)
    got = multiply(quantize_rows(rows), quantize_rows(weight), torch.float32).double()
    errors = []
    for x in (rows.double(), weight.double()):
        floor = torch.tensor([[scale_of(row) * 2.0**-10] for row in x], dtype=torch.float64)
        errors.append((x.abs() * 2.0**-4).maximum(floor))
    (dx, dw), x, w = errors, rows.double().abs(), weight.double().abs()
    allowed = dx @ w.t() + x @ dw.t() + dx @ dw.t() + 1e-5 * x @ w.t()
    error = (got - rows.double() @ weight.double().t()).abs()
    assert (error <= allowed).all()
    assert error.max() > 0.0


def test_representable_numbers_multiply_exactly():
    """e4m3 numbers times a power of two, different in every row; 16 products of few bits fit in fp32."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        nearest(torch.randint(-7, 8, (8, 16), generator=generator) / 4.0)
        * 2.0 ** torch.arange(-4.0, 4.0)[:, None]
        for _ in range(2)
    )
    got = multiply(quantize_rows(left.float()), quantize_rows(right.float()), torch.float32)
    assert (got.double() == left @ right.t()).all()
    assert got.any()


def test_an_outlier_leaves_other_rows_alone():
    rows, weight = draw("gaussian", 6, 48), quantize_rows(draw("gaussian", 16, 48))
    wild = rows.clone()
    wild[2, 7] = 3e5
    before, after = (multiply(quantize_rows(x), weight, torch.float32) for x in (rows, wild))
    same = [bool((a == b).all()) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, True, True, True]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows(bad):
    rows, weight = draw("gaussian", 4, 32), draw("gaussian", 16, 32)
    rows[1, 5], weight[3, 0] = bad, bad
    got = multiply(quantize_rows(rows), quantize_rows(weight), torch.float32)
    wrong = torch.zeros(4, 16, dtype=torch.bool)
    wrong[1], wrong[:, 3] = True, True
    assert torch.equal(got.isnan(), wrong)


@pytest.mark.parametrize("kind", ["gaussian", "heavy_tails", "outlier"])
def test_parts_of_a_row_have_the_codes_of_the_whole(kind):
    """What tensor parallelism rests on: only what lies below a row's floor depends on the scale."""
    rows = draw(kind, 6, 64)
    whole, parts = decoded(rows), torch.cat([decoded(half) for half in rows.split(32, dim=1)], 1)
    floor = torch.tensor([[scale_of(row) * 2.0**-6] for row in rows], dtype=torch.float64)
    above = rows.abs() >= floor
    assert above.double().mean() > 0.5
    assert (whole[above] == parts[above]).all()
    assert ((whole - parts).abs() <= floor * 2.0**-4).all()


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="torch has no scales by row on a CPU",
)
def test_takes_what_torch_takes():
    """The call that runs on a GPU, as torch's own CPU implementation understands its arguments."""
    (rows, row_scales), (weight, weight_scales) = (quantize_rows(draw("gaussian", n, 64)) for n in (5, 32))
    torchs = torch._scaled_mm(
        rows, weight.t(), scale_a=row_scales, scale_b=weight_scales.t(), out_dtype=torch.bfloat16
    )
    ours = multiply((rows, row_scales), (weight, weight_scales), torch.float32)
    assert torch.allclose(torchs.float(), ours, rtol=2.0**-8, atol=1e-5)


def test_codes_of_weights_last_until_they_are_forgotten():
    weight = torch.nn.Parameter(draw("gaussian", 32, 48), requires_grad=False)
    rows, fp8 = draw("gaussian", 3, 48)[:, None], Fp8Pass()
    bias = torch.arange(32.0)
    first = fp8.linear(rows, weight, bias)
    assert first.shape == (3, 1, 32)
    # Adding a bias of up to 31 rounds by 2e-6 at most, subtracting it again as well.
    without = fp8.linear(rows, weight, None)
    torch.testing.assert_close(first - bias, without, rtol=0, atol=5e-6)
    assert fp8.num_bytes == 32 * 48 + 4 * 32
    weight.mul_(2)
    assert torch.equal(fp8.linear(rows, weight, bias), first)
    fp8.forget()
    assert fp8.num_bytes == 0
    assert torch.equal(fp8.linear(rows, weight, None), 2 * without)  # a power of two goes into the scales


class Linear:
    """The part of Megatron's linear layers that is called."""

    def _forward_impl(self, input, weight, *, bias, **_):
        return torch.nn.functional.linear(input, weight, bias)


class Fp8Linear(_Fp8Teacher, Linear): ...


def test_only_the_teachers_pass_is_in_fp8():
    """Outside of it the layer is the one that it was, bit by bit; inside it computes with codes, the bias among it."""
    fp8 = Fp8Pass()
    layer, rows = Fp8Linear(fp8=fp8), draw("gaussian", 6, 48)
    weight, bias = torch.nn.Parameter(draw("gaussian", 16, 48)), torch.arange(16.0)
    given = dict(bias=bias, tp_group=None, sequence_parallel=False)

    def computed():
        return layer._forward_impl(rows, weight, **given).detach()

    plain = torch.nn.functional.linear(rows, weight, bias).detach()
    assert torch.equal(computed(), plain)
    assert fp8.num_bytes == 0
    with torch.no_grad(), fp8.run():
        inside = computed()
    coded = decoded(rows) @ decoded(weight.detach()).t() + bias
    # Sums of 48 products of about 1 in fp32, and the bias's rounding; fp8's own error is a thousand times that.
    torch.testing.assert_close(inside.double(), coded, rtol=0, atol=1e-5)
    assert (inside - plain).abs().max() > 0.01
    assert torch.equal(computed(), plain)


# Flags -> words of the refusal.
REFUSED = {
    "no_teacher": ("--objective lm", "--teacher-precision is a setting of objective laver"),
    "transformer_engine": (
        "--objective laver --transformer-impl transformer_engine",
        "use transformer_impl=local",
    ),
    "odd_width": (
        "--objective laver --ffn-hidden-size 136",
        "ffn_hidden_size / tensor_model_parallel_size is 136",
    ),
    "odd_share": (
        "--objective laver --num-attention-heads 8 --num-query-groups 2 --kv-channels 4 --tensor-model-parallel-size 2",
        "num_query_groups x kv_channels x 2 / tensor_model_parallel_size is 8",
    ),
}


@pytest.mark.parametrize(("flags", "words"), REFUSED.values(), ids=REFUSED)
def test_recipe_is_refused(flags, words):
    base = "--model tiny --vision encoder-free --data-path x --tokenizer-model x --teacher-precision fp8"
    with pytest.raises(ConfigError, match=words) as error:
        parse([*base.split(), *flags.split()])
    assert "\n" not in str(error.value)


# Capability, layers -> words of the refusal, none where it runs.
DEVICES = {
    "ampere": ((8, 0), "local", "needs compute capability 8.9"),
    "ada": ((8, 9), "local", None),
    "hopper": ((9, 0), "auto", None),
    "hopper_engine": ((9, 0), "engine", "transformer_impl=auto takes Transformer Engine's"),
}


@pytest.mark.parametrize(("capability", "layers", "words"), DEVICES.values(), ids=DEVICES)
def test_device_is_asked(monkeypatch, capability, layers, words):
    from laver_mcore.model import layer_spec

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(layer_spec, "use_transformer_engine", lambda impl, bf16: layers == "engine")
    if words is None:
        require_fp8("auto", bf16=True)
    else:
        with pytest.raises(ConfigError, match=words):
            require_fp8("auto", bf16=True)
