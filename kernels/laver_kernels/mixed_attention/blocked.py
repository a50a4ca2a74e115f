"""Mixed attention in plain PyTorch, block by block: the backend without a GPU (`impl="reference"`).

No row sees across the boundaries of its block, so that a packed sequence is a few batched dense attentions; what is
computed stands in `reference.py`.

Legend: B blocks of one group, L tokens of a padded block; the rest as in the package.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laver_kernels.mixed_attention.intervals import Intervals
from laver_kernels.mixed_attention.rope import rotate


@dataclass(frozen=True, kw_only=True)
class Group:
    """Documents of similar length, padded to one length: what a batched dense attention can take at once."""

    num_blocks: int
    length: int
    mask_B1LL: Tensor  # True where a row sees a key
    live_B1L1: Tensor | None  # False for rows that see nothing; None where every row sees something


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a packed sequence splits into groups; built once per mask and shared by all layers."""

    groups: tuple[Group, ...]
    gather: Tensor | None  # token of every padded slot, all groups after one another; None: already in order
    scatter: Tensor | None  # slot of every token


def mixed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    intervals: Intervals,
    rope: tuple[Tensor, Tensor] | None,
    softmax_scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output and, where wanted, log-sum-exps of `api.mixed_attention`, in fp32 (fp64 for fp64 inputs)."""
    if rope is not None:
        q_THD, k_TGD = rotate(q_THD, *rope), rotate(k_TGD, *rope)
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_THD, k_TGD, v_TGD))
    plan = plan_of(intervals)
    if plan.gather is not None:
        q, k, v = (x.index_select(0, plan.gather) for x in (q, k, v))
    # One split each: its backward is one concatenation, where slices would each fill a tensor with zeros.
    rows = [group.num_blocks * group.length for group in plan.groups]
    columns = [group.num_blocks * group.mask_B1LL.shape[-1] for group in plan.groups]
    parts = list(zip(q.split(rows), k.split(columns), v.split(columns), plan.groups, strict=True))
    out = _ordered([_attend(*part, softmax_scale) for part in parts], plan).to(q_THD.dtype)
    if not return_lse:
        return out, None
    return out, _ordered([_log_sum_exp(q, k, g, softmax_scale) for q, k, _, g in parts], plan).T


def _ordered(parts: list[Tensor], plan: Plan) -> Tensor:
    """The groups' rows as one tensor, in the order of the tokens."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole if plan.scatter is None else whole.index_select(0, plan.scatter)


def _log_sum_exp(q: Tensor, k: Tensor, group: Group, softmax_scale: float) -> Tensor:
    """Natural log-sum-exp of the scores that a row sees, `[B * L, H]`; -inf where it sees nothing."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    q_BLHD, k_BLHD = (x.view(group.num_blocks, -1, *x.shape[1:]) for x in (q, k))
    score_BHLL = softmax_scale * torch.einsum("bihd,bjhd->bhij", q_BLHD, k_BLHD)
    lse_BHL1 = score_BHLL.masked_fill(~group.mask_B1LL, -float("inf")).logsumexp(-1, keepdim=True)
    if group.live_B1L1 is not None:
        lse_BHL1 = torch.where(group.live_B1L1, lse_BHL1, -float("inf"))
    return lse_BHL1[..., 0].transpose(1, 2).reshape(-1, q.shape[1])


def _attend(q: Tensor, k: Tensor, v: Tensor, group: Group, softmax_scale: float) -> Tensor:
    """Dense attention within the blocks of one group, `[B * L, H, D]` in and out."""
    heads_per_group = q.shape[1] // k.shape[1]
    if heads_per_group > 1:
        k, v = (x.repeat_interleave(heads_per_group, dim=1) for x in (k, v))
    q_BHLD, k_BHLD, v_BHLD = (x.view(group.num_blocks, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out_BHLD = F.scaled_dot_product_attention(
        q_BHLD, k_BHLD, v_BHLD, attn_mask=group.mask_B1LL, scale=softmax_scale
    )
    if group.live_B1L1 is not None:
        out_BHLD = torch.where(group.live_B1L1, out_BHLD, 0.0)
    return out_BHLD.transpose(1, 2).reshape(q.shape)


def plan_of(intervals: Intervals) -> Plan:
    """The plan of a mask, remembered on the mask itself."""
    plan = intervals.__dict__.get("_blocked_plan")
    if plan is None:
        plan = _make_plan(intervals)
        intervals.__dict__["_blocked_plan"] = plan
    return plan


def _make_plan(intervals: Intervals) -> Plan:
    if intervals.num_keys != len(intervals):
        return Plan(groups=(_rectangle(intervals),), gather=None, scatter=None)
    bounds = intervals.blocks if intervals.blocks is not None else find_blocks(intervals)
    sizes = [(end - start, start) for start, end in itertools.pairwise(bounds)]
    same_length = len({length for length, _ in sizes}) == 1
    device = intervals.device
    slots, groups = [], []
    for members in _by_length(sizes):
        length = members[0][0]
        start_B1 = torch.tensor([[start] for _, start in members], device=device)
        size_B1 = torch.tensor([[size] for size, _ in members], device=device)
        offset_L = torch.arange(length, device=device)
        is_real_BL = offset_L < size_B1
        token_BL = torch.where(is_real_BL, start_B1 + offset_L, start_B1)
        slots.append((token_BL, is_real_BL))
        groups.append(_make_group(intervals, start_B1, token_BL, is_real_BL))
    if same_length:
        return Plan(groups=tuple(groups), gather=None, scatter=None)
    gather = torch.cat([token.flatten() for token, _ in slots])
    is_real = torch.cat([real.flatten() for _, real in slots])
    scatter = torch.empty(len(intervals), dtype=torch.int64, device=device)
    scatter[gather[is_real]] = is_real.nonzero().flatten()
    return Plan(groups=tuple(groups), gather=gather, scatter=scatter)


def _rectangle(intervals: Intervals) -> Group:
    """Fewer queries than keys (a KV cache, a block of a ring): all of them at once."""
    key_T = torch.arange(intervals.num_keys, device=intervals.device)
    sees_TT = (key_T >= intervals.row_lo_T[:, None]) & (key_T < intervals.row_hi_T[:, None])
    is_live_T1 = sees_TT.any(-1, keepdim=True)
    return Group(
        num_blocks=1,
        length=len(intervals),
        mask_B1LL=(sees_TT | ~is_live_T1)[None, None],
        live_B1L1=None if bool(is_live_T1.all()) else is_live_T1[None, None],
    )


def _make_group(intervals: Intervals, start_B1: Tensor, token_BL: Tensor, is_real_BL: Tensor) -> Group:
    key_B1L = token_BL[:, None, :]
    lo_BL1, hi_BL1 = intervals.row_lo_T[token_BL][..., None], intervals.row_hi_T[token_BL][..., None]
    sees = (key_B1L >= lo_BL1) & (key_B1L < hi_BL1) & is_real_BL[:, None, :] & is_real_BL[..., None]
    is_live = sees.any(-1, keepdim=True)
    # A softmax over nothing is NaN: an empty row looks at everything, and its output is put to zero after.
    mask = sees | ~is_live
    all_live = bool((is_live | ~is_real_BL[..., None]).all())
    return Group(
        num_blocks=token_BL.shape[0],
        length=token_BL.shape[1],
        mask_B1LL=mask[:, None],
        live_B1L1=None if all_live else is_live[:, None],
    )


def _by_length(sizes: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Blocks in groups whose shortest is at least three quarters of the longest; equals keep their order."""
    groups: list[list[tuple[int, int]]] = []
    for size, start in sorted(sizes, key=lambda item: (-item[0], item[1])):
        if groups and 4 * size >= 3 * groups[-1][0][0]:
            groups[-1].append((size, start))
        else:
            groups.append([(size, start)])
    return groups


def find_blocks(intervals: Intervals) -> tuple[int, ...]:
    """Boundaries of the smallest blocks of tokens that no row sees across."""
    lo, hi = intervals.row_lo_T.cpu().long(), intervals.row_hi_T.cpu().long()
    num_tokens = len(lo)
    place = torch.arange(num_tokens)
    is_empty = lo >= hi
    reach = torch.where(is_empty, place + 1, torch.maximum(hi, place + 1)).cummax(0).values
    back = torch.where(is_empty, place, torch.minimum(lo, place)).flip(0).cummin(0).values.flip(0)
    is_cut = (reach[:-1] <= place[1:]) & (back[1:] >= place[1:])
    cuts = (is_cut.nonzero().flatten() + 1).tolist()
    return (0, *cuts, num_tokens)
