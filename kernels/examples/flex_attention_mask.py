"""A FlexAttention mask as intervals: the same attention without a block mask, compiled or not.

    python kernels/examples/flex_attention_mask.py

A mask function of documents and images, as FlexAttention's users write it, lets every row see one stretch of keys. Two
lists of spans say the same in 16 bytes a token, and there is nothing to build per batch but four small tensors.
"""

import warnings

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from laver_kernels import Intervals, mixed_attention

DOCUMENTS = [(0, 70), (70, 128)]
IMAGES = [(6, 42), (80, 96)]


def ids_of(spans: list[tuple[int, int]], num_tokens: int) -> torch.Tensor:
    """Index of the span that a token lies in, -1 for none."""
    ids = torch.full((num_tokens,), -1)
    for number, (start, end) in enumerate(spans):
        ids[start:end] = number
    return ids


def main() -> float:
    """Runs both on the CPU; returns the largest difference."""
    torch.manual_seed(0)
    document, image = ids_of(DOCUMENTS, 128), ids_of(IMAGES, 128)

    def mask_mod(batch, head, row, key):
        same_image = (image[row] == image[key]) & (image[row] >= 0)
        return (document[row] == document[key]) & ((key <= row) | same_image)

    q, k, v = (torch.randn(1, heads, 128, 32) for heads in (4, 2, 2))
    block_mask = create_block_mask(mask_mod, None, None, 128, 128, device="cpu")
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    want = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    intervals = Intervals.from_spans(DOCUMENTS, IMAGES)
    # On a GPU leave `impl` out: it is Triton's kernel then.
    got = mixed_attention(*(x.transpose(1, 2) for x in (q, k, v)), intervals, impl="reference")
    difference = float((got.transpose(1, 2) - want).abs().max())
    print(f"largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
