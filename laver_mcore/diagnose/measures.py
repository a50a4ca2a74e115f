"""Measures of states and of attention; none holds a matrix of all tokens by all tokens of a sequence.

Shapes: H heads, Q queries, K keys, C width of a head, N tokens, D width.
"""

import math

import torch
import torch.nn.functional as F


def similarity(states_ND: torch.Tensor) -> float:
    """Mean cosine of different tokens; not a number for fewer than two.

    Linear in N: the sum over all pairs of unit vectors is the squared norm of their sum.
    """
    unit_ND = F.normalize(states_ND.double(), dim=-1)
    count = len(unit_ND)
    if count < 2:
        return math.nan
    own = float(unit_ND.square().sum())
    return (float(unit_ND.sum(0).square().sum()) - own) / (count * (count - 1))


def effective_rank(states_ND: torch.Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(states_ND.double())
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def gram(states_ND: torch.Tensor) -> torch.Tensor:
    """Cosines of the tokens of one image, [N, N]."""
    unit_ND = F.normalize(states_ND.float(), dim=-1)
    return unit_ND @ unit_ND.T


def cknna(states_ND: torch.Tensor, others_NE: torch.Tensor, neighbours: int = 10) -> float:
    """Alignment of two representations of the same N tokens (Huh et al., arXiv 2405.07987, appendix A).

    A kernel alignment, each kernel less its row's mean, over pairs that are nearest neighbours in both.
    """
    if len(states_ND) != len(others_NE) or not 1 <= neighbours < len(states_ND):
        raise ValueError(
            f"{neighbours} neighbours of {len(states_ND)} and {len(others_NE)} tokens: "
            "both need the same tokens, and more than the neighbours"
        )
    kernels = [F.normalize(x.double(), dim=-1) for x in (states_ND, others_NE)]
    kernels = [x @ x.T for x in kernels]
    near = [_nearest(kernel, neighbours) for kernel in kernels]
    centred = [kernel - kernel.mean(1, keepdim=True) for kernel in kernels]

    def alignment(a: int, b: int) -> float:
        return float((centred[a] * centred[b])[near[a] & near[b]].sum())

    own = alignment(0, 0) * alignment(1, 1)
    return alignment(0, 1) / math.sqrt(own) if own > 0 else math.nan


def _nearest(kernel_NN: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Whether j is among the nearest neighbours of i, which it is not itself, bool [N, N]."""
    others = kernel_NN.clone().fill_diagonal_(-math.inf)
    return torch.zeros_like(kernel_NN, dtype=torch.bool).scatter_(
        1, others.topk(neighbours, dim=1).indices, True
    )


def attention_share(
    query_HQC: torch.Tensor,
    key_HKC: torch.Tensor,
    place_Q: torch.Tensor,
    chosen_K: torch.Tensor,
    scale: float,
    block: int = 512,
) -> torch.Tensor:
    """Share of each text query's attention that falls on the `chosen_K` keys, fp32 [H, Q].

    The query at `place_Q` sees the keys up to its own place. Log-sum-exps over blocks of keys: memory is H x Q x block.
    """
    every = query_HQC.new_full(query_HQC.shape[:2], -math.inf, dtype=torch.float32)
    chosen = every.clone()
    for start in range(0, key_HKC.shape[1], block):
        keys = key_HKC[:, start : start + block].float()
        scores = scale * query_HQC.float() @ keys.transpose(1, 2)
        place = torch.arange(start, start + keys.shape[1], device=place_Q.device)
        scores = scores.masked_fill(place > place_Q[:, None], -math.inf)
        every = torch.logaddexp(every, scores.logsumexp(-1))
        scores = scores.masked_fill(~chosen_K[start : start + block], -math.inf)
        chosen = torch.logaddexp(chosen, scores.logsumexp(-1))
    return (chosen - every).exp()


def image_attention(query_HQC: torch.Tensor, key_HNC: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of text queries over the N visual keys of one image that they see whole, sum 1, fp32 [H, Q, N]."""
    return (scale * query_HQC.float() @ key_HNC.float().transpose(1, 2)).softmax(-1)


def spatial_entropy(weights_HQN: torch.Tensor) -> torch.Tensor:
    """Entropy of attention over an image's places in units of the even spread's, 0 to 1, [H, Q]."""
    return torch.special.entr(weights_HQN).sum(-1) / math.log(weights_HQN.shape[-1])
