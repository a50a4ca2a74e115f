"""The probe's answers and keys, against a whole attention matrix of the packed row."""

import numpy as np
import pytest
import torch

from laver_mcore.data.sequence.batch import collate
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample, ImageSpan
from laver_mcore.diagnose.measures import attention_share
from laver_mcore.validation.probe import _answers

HEADS, GROUPS, WIDTH = 4, 2, 6


def sample(length, image_start, answers):
    """A dialogue with one image of 2 x 2 tokens, or none, and answers at these places."""
    labels = np.full(length, IGNORE, dtype=np.int32)
    labels[answers] = 1
    spans = () if image_start is None else (ImageSpan(start=image_start, height=2, width=2),)
    return EncodedSample(token_ids_L=np.ones(length, dtype=np.int32), labels_L=labels, image_spans=spans)


def test_shares_are_those_of_the_whole_matrix():
    samples = [sample(7, 1, [5, 6]), sample(4, None, [2]), sample(9, 2, [6, 8]), sample(6, 1, [])]
    batch = collate(samples, list("abcd"), total_length=28, pad_id=0)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(28, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS))
    scale = WIDTH**-0.5
    got = [attention_share(q, k, place, chosen, scale) for q, k, place, chosen in _answers(batch, query, key)]
    wanted = []
    for start, sees_from, answers in (
        (0, 1, (5, 6)),
        (11, 2, (6, 8)),
    ):  # the text alone has no picture to look at
        for head in range(HEADS):
            for place in answers:
                row = start + place
                scores = key[start : row + 1, head // (HEADS // GROUPS)] @ query[row, head] * scale
                wanted.append(scores.softmax(0)[sees_from : sees_from + 4].sum().item())
    assert torch.cat([share.flatten() for share in got]).tolist() == pytest.approx(wanted, abs=1e-5)
