"""Measures of states and attention against their definitions, written as loops in fp64."""

import math

import pytest
import torch

from laver_mcore.diagnose import measures

CLOSE = {"rel": 1e-5, "abs": 1e-5}


def states(tokens: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) + 0.5


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("tokens", [2, 9, 36])
def test_similarity(tokens):
    x = states(tokens)
    pairs = [cosine(x[i], x[j]) for i in range(tokens) for j in range(tokens) if i != j]
    assert measures.similarity(x) == pytest.approx(sum(pairs) / len(pairs), **CLOSE)
    assert float(measures.gram(x)[0, 1]) == pytest.approx(pairs[0], **CLOSE)


def test_a_single_token_is_like_nothing():
    assert math.isnan(measures.similarity(states(1)))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_effective_rank(rank):
    """Equal singular values count one each; others through the eigenvalues of the second moments."""
    even = torch.linalg.qr(states(30, rank))[0]
    assert measures.effective_rank(even) == pytest.approx(rank, **CLOSE)
    x = states(30, rank, seed=1).double()
    values = torch.linalg.eigvalsh(x.T @ x).sqrt().tolist()
    shares = [value / sum(values) for value in values]
    wanted = math.exp(-sum(share * math.log(share) for share in shares))
    assert measures.effective_rank(x.float()) == pytest.approx(wanted, **CLOSE)


@pytest.mark.parametrize("neighbours", [1, 5, 19])
def test_cknna(neighbours):
    x, y = states(20), states(20, 7, seed=1)
    y[:, :3] += x[:, :3]
    kernels = [[[cosine(a, b) for b in z] for a in z] for z in (x, y)]

    def near(kernel: list[list[float]], i: int) -> list[int]:
        return sorted((j for j in range(20) if j != i), key=lambda j: -kernel[i][j])[:neighbours]

    def alignment(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(
            (a[i][j] - sum(a[i]) / 20) * (b[i][j] - sum(b[i]) / 20)
            for i in range(20)
            for j in set(near(a, i)) & set(near(b, i))
        )

    own = alignment(kernels[0], kernels[0]) * alignment(kernels[1], kernels[1])
    wanted = alignment(*kernels) / math.sqrt(own)
    assert measures.cknna(x, y, neighbours) == pytest.approx(wanted, **CLOSE)
    assert measures.cknna(x, 3 * x, neighbours) == pytest.approx(1.0, **CLOSE)


@pytest.mark.parametrize(("tokens", "others", "neighbours"), [(9, 8, 3), (9, 9, 9), (9, 9, 0)])
def test_neighbours_that_are_not_there(tokens, others, neighbours):
    with pytest.raises(ValueError, match="neighbours"):
        measures.cknna(states(tokens), states(others), neighbours)


@pytest.mark.parametrize("block", [1, 7, 64, 512])
@pytest.mark.parametrize("size", [1.0, 4.0], ids=["even", "sharp"])
def test_attention_share(block, size):
    """Beside the whole matrix in fp64."""
    generator = torch.Generator().manual_seed(0)
    query, key = (size * torch.randn(3, 100, 16, generator=generator) for _ in range(2))
    chosen, place = torch.zeros(100, dtype=torch.bool), torch.tensor([3, 41, 60, 99])
    chosen[5:41] = True
    scores = 0.25 * query.double() @ key.double().transpose(1, 2)
    sees = torch.ones(100, 100, dtype=torch.bool).tril()
    whole = scores.masked_fill(~sees, -math.inf).softmax(-1)
    got = measures.attention_share(query[:, place], key, place, chosen, 0.25, block)
    torch.testing.assert_close(got.double(), whole[:, place][..., chosen].sum(-1), rtol=0, atol=1e-5)
    assert float(got[:, 0].max()) == 0.0  # before the image
    over = measures.image_attention(query[:, place[1:]], key[:, chosen], 0.25)
    wanted = scores[:, place[1:]][..., chosen].softmax(-1)
    torch.testing.assert_close(over.double(), wanted, rtol=0, atol=1e-5)


def test_spatial_entropy():
    weights = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]])
    assert measures.spatial_entropy(weights)[0].tolist() == pytest.approx([1.0, 0.0, 0.5], **CLOSE)
