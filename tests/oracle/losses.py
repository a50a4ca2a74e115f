"""The sums that are divided by global counts (LaVer, arXiv 2512.06281; section 1.4 of the method's notes)."""

import torch


def next_token_sum(states_SD: torch.Tensor, head_VD: torch.Tensor, labels_S: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over rows whose label is not -100."""
    log_probabilities = (states_SD @ head_VD.T).log_softmax(-1)
    return -sum(
        (log_probabilities[row, label] for row, label in enumerate(labels_S.tolist()) if label != -100),
        start=states_SD.new_zeros(()),
    )


def mim_sum(student_NK, teacher_NK, masked_N, center_K, tau_student: float, tau_teacher: float):
    """- sum over masked tokens of softmax((z^ - c) / tau_t) . log_softmax(z~ / tau_s)."""
    target = ((teacher_NK - center_K) / tau_teacher).softmax(-1)
    return -(target * (student_NK / tau_student).log_softmax(-1)).sum(-1)[masked_N].sum()


def _blocks(lengths):
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _gram(z_NK: torch.Tensor) -> torch.Tensor:
    unit = z_NK / z_NK.norm(dim=-1, keepdim=True)
    return unit @ unit.T


def gram_sum(student_NK, teacher_NK, lengths, *, clip: bool) -> torch.Tensor:
    """Sum over images of || max(0, G(z~) - G(z^)) ||_F^2 / N^2, or of the plain difference."""
    total = student_NK.new_zeros(())
    for block in _blocks(lengths):
        difference = _gram(student_NK[block]) - _gram(teacher_NK[block])
        if clip:
            difference = difference.clamp(min=0)
        total = total + difference.square().sum() / (block.stop - block.start) ** 2
    return total


def similarity_sum(visual_ND: torch.Tensor, lengths) -> torch.Tensor:
    """Sum over images of at least two tokens of the mean cosine between two different ones."""
    total = visual_ND.new_zeros(())
    for block in _blocks(lengths):
        count = block.stop - block.start
        if count > 1:
            gram = _gram(visual_ND[block])
            total = total + (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))
    return total
