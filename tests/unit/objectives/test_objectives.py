"""The four objectives against their formulas in fp64, token by token; and sums that do not mind how data is split."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist

from laver_mcore.data.sequence.batch import Batch, collate
from laver_mcore.data.sequence.prompt import IGNORE, EncodedSample
from laver_mcore.model.method import ModelOutput
from laver_mcore.objectives.gram import gram_sum, num_gram_matrices
from laver_mcore.objectives.latent import latent_sum
from laver_mcore.objectives.next_token import next_token_sum
from laver_mcore.objectives.similarity import num_similar_images, similarity_sum

WIDTH = 24
TAU_S, TAU_T = 0.1, 0.04

# Visual tokens of each image of a micro-batch.
IMAGES = {
    "one_image": (12,),
    "several_sizes": (9, 4, 16, 6),
    "equal_sizes": (8, 8, 8),
    "one_token": (1,),
    "one_token_among_others": (5, 1, 7),
    "two_tokens": (2,),
    "no_image": (),
}


@dataclass(frozen=True)
class Case:
    student_NK: torch.Tensor
    teacher_NK: torch.Tensor
    masked_N: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def images(self) -> list[slice]:
        ends = np.cumsum(self.lengths, dtype=int)
        return [slice(int(end) - length, int(end)) for end, length in zip(ends, self.lengths, strict=True)]


def make_case(lengths: tuple[int, ...], dtype=torch.float32) -> Case:
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    student, teacher = torch.randn(2, sum(lengths), WIDTH, generator=generator, dtype=torch.float64)
    masked = torch.rand(sum(lengths), generator=generator) < 0.5
    if len(masked):
        masked[0] = True
    return Case((student + 0.5).to(dtype), (teacher + 0.5).to(dtype), masked, lengths)


@pytest.fixture(params=IMAGES.values(), ids=IMAGES)
def case(request) -> Case:
    return make_case(request.param)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def latent_formula(case: Case, center: np.ndarray | float) -> float:
    """- sum over masked tokens of softmax((teacher - c) / tau_t) . log softmax(student / tau_s)."""
    student, teacher = case.student_NK.double().numpy(), case.teacher_NK.double().numpy()
    total = 0.0
    for i in np.flatnonzero(case.masked_N.numpy()):
        total -= float(softmax((teacher[i] - center) / TAU_T) @ np.log(softmax(student[i] / TAU_S)))
    return total


def gram(z: np.ndarray) -> np.ndarray:
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in z] for a in z])


def gram_formula(case: Case, clip: bool, images: list[slice]) -> float:
    """Sum over images of || max(0, G(student) - G(teacher)) ||_F^2 / N^2."""
    student, teacher = case.student_NK.double().numpy(), case.teacher_NK.double().numpy()
    total = 0.0
    for image in images:
        difference = gram(student[image]) - gram(teacher[image])
        if clip:
            difference = np.maximum(difference, 0)
        total += float(np.square(difference).sum()) / len(difference) ** 2
    return total


def call_latent(case: Case, center=None) -> torch.Tensor:
    rows = torch.from_numpy(np.flatnonzero(case.masked_N.numpy()))
    return latent_sum(
        case.student_NK,
        case.teacher_NK,
        rows,
        center_K=center,
        student_temperature=TAU_S,
        teacher_temperature=TAU_T,
        impl="reference",
    )


def call_gram(case: Case, kind="cga", scope="image") -> torch.Tensor:
    return gram_sum(
        case.student_NK, case.teacher_NK, case.lengths, gram=kind, gram_scope=scope, impl="reference"
    )


def halves(case: Case) -> list[Case]:
    """The same images as two micro-batches."""
    middle = len(case.lengths) // 2
    cut = sum(case.lengths[:middle])
    parts = [(slice(None, cut), case.lengths[:middle]), (slice(cut, None), case.lengths[middle:])]
    return [Case(case.student_NK[s], case.teacher_NK[s], case.masked_N[s], lengths) for s, lengths in parts]


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
def test_latent(case, centred):
    center = torch.linspace(-0.2, 0.2, WIDTH) if centred else None
    got = call_latent(case, center)
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert got.item() == pytest.approx(
        latent_formula(case, 0.0 if center is None else center.numpy()), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["cga", "ga"])
def test_gram_per_image(case, kind):
    got = call_gram(case, kind)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(gram_formula(case, kind == "cga", case.images), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", ["cga", "ga"])
def test_gram_over_the_micro_batch(case, kind):
    everything = [slice(0, sum(case.lengths))] if case.lengths else []
    got = call_gram(case, kind, "micro_batch")
    assert got.item() == pytest.approx(gram_formula(case, kind == "cga", everything), rel=1e-4, abs=1e-9)


def test_similarity_is_the_mean_over_pairs(case):
    vectors = case.student_NK.double().numpy()
    wanted = 0.0
    for image in case.images:
        cosines = gram(vectors[image])
        n = len(cosines)
        if n > 1:
            pairs = [cosines[i, j] for i in range(n) for j in range(n) if i != j]
            wanted += sum(pairs) / len(pairs)
    got = similarity_sum(case.student_NK, case.lengths)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lengths", IMAGES.values(), ids=IMAGES)
def test_counts(lengths):
    assert num_gram_matrices(lengths, "image") == len(lengths)
    assert num_gram_matrices(lengths, "micro_batch") == (1 if lengths else 0)
    assert num_similar_images(lengths) == len([n for n in lengths if n >= 2])


def test_sums_do_not_depend_on_the_split(case):
    parts = halves(case)
    for objective in (call_latent, call_gram, lambda c: similarity_sum(c.student_NK, c.lengths)):
        split = sum(objective(part).item() for part in parts)
        assert objective(case).item() == pytest.approx(split, rel=1e-5, abs=1e-7)
    for count in (lambda lengths: num_gram_matrices(lengths, "image"), num_similar_images):
        assert count(case.lengths) == sum(count(part.lengths) for part in parts)


def test_alike_tokens_have_similarity_one():
    same_ND = torch.randn(1, WIDTH).expand(9, WIDTH) * torch.linspace(0.1, 3, 9)[:, None]
    assert similarity_sum(same_ND, (4, 5)).item() == pytest.approx(2.0, rel=1e-5)


def test_clipped_gram_forgives_tokens_that_are_less_alike():
    case = make_case((10,))
    alike_NK = torch.ones(10, WIDTH) + 1e-3 * case.student_NK
    less, more = (
        Case(case.student_NK, alike_NK, case.masked_N, (10,)),
        Case(alike_NK, case.student_NK, case.masked_N, (10,)),
    )
    assert call_gram(less).item() == 0.0
    assert call_gram(more).item() > 0.1
    assert call_gram(less, "ga").item() == pytest.approx(call_gram(more, "ga").item(), rel=1e-4)


def test_one_token_image_has_no_gram_loss_but_a_latent_one():
    case = make_case((1,))
    assert call_gram(case).item() == call_gram(case, "ga").item() == 0.0
    assert call_latent(case).item() > 0.0


@pytest.mark.parametrize("objective", [call_latent, call_gram], ids=["latent", "gram"])
def test_no_image_is_zero_and_keeps_the_graph(objective):
    empty = make_case(())
    student_NK = empty.student_NK.requires_grad_()
    loss = objective(Case(student_NK, empty.teacher_NK, empty.masked_N, ()))
    loss.backward()
    assert loss.item() == 0.0
    assert student_NK.grad is not None


@pytest.mark.parametrize("objective", [call_latent, call_gram], ids=["latent", "gram"])
def test_the_teacher_gets_no_gradient(objective):
    case = make_case((6, 4))
    student, teacher = case.student_NK.requires_grad_(), case.teacher_NK.requires_grad_()
    objective(case).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_latent_gradient_stays_at_masked_tokens():
    case = make_case((9, 6))
    student = case.student_NK.requires_grad_()
    call_latent(case).backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, case.masked_N)


# Next token: supervised tokens of each document of a micro-batch (every document has 8), vocabulary, its padding.
DOCUMENTS = {
    "one": ((3,), 50, 0),
    "several": ((3, 1, 8, 0), 50, 0),
    "padded_vocabulary": ((3, 5), 50, 14),
    "nothing_supervised": ((0, 0), 50, 0),
}


@pytest.fixture(scope="module")
def group():
    """A process group of one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield dist.group.WORLD
        dist.destroy_process_group()
    else:
        yield dist.new_group([dist.get_rank()])


def document(supervised: int, vocab_size: int, seed: int) -> EncodedSample:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, vocab_size, 8)
    labels[: 8 - supervised] = IGNORE
    return EncodedSample(token_ids_L=generator.integers(0, vocab_size, 8), labels_L=labels, image_spans=())


def micro_batch(documents: list[EncodedSample], padding: int) -> Batch:
    return collate(documents, ["d"] * len(documents), total_length=8 * len(documents) + padding, pad_id=0)


def call_next_token(batch, hidden_TD, weight_VD, vocab_size, group, share=(0, 1)) -> torch.Tensor:
    output = ModelOutput(
        dialogue_TD=hidden_TD, images_ND=None, target_NK=None, travelling=(), output_weight_VD=weight_VD
    )
    return next_token_sum(
        output,
        batch.labels_T,
        batch.supervised_rows_M,
        vocab_size=vocab_size,
        tp_group=group,
        share=share,
        impl="reference",
    )


@pytest.mark.parametrize(("supervised", "vocab_size", "padding"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_next_token(supervised, vocab_size, padding, group):
    torch.manual_seed(0)
    documents = [document(number, vocab_size, seed) for seed, number in enumerate(supervised)]
    batch = micro_batch(documents, padding=5)
    hidden_TD = torch.randn(len(batch.tokens_T), WIDTH).requires_grad_()
    weight_VD = torch.randn(vocab_size + padding, WIDTH)
    loss = call_next_token(batch, hidden_TD, weight_VD, vocab_size, group)
    logits = hidden_TD.detach().double().numpy() @ weight_VD[:vocab_size].double().numpy().T
    wanted = 0.0
    for row, label in enumerate(batch.labels_T.tolist()):
        if label != IGNORE:
            wanted -= np.log(softmax(logits[row])[label])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert torch.equal(hidden_TD.grad.abs().sum(-1) > 0, batch.labels_T != IGNORE)
    assert len(batch.supervised_rows_M) == sum(supervised)


def test_parts_of_the_supervised_rows_add_up(group):
    """Context-parallel ranks take a part each: all rows are in one of them, and no row in two."""
    torch.manual_seed(0)
    batch = micro_batch([document(number, 50, number) for number in (3, 8, 2)], padding=0)
    hidden_TD, weight_VD = torch.randn(24, WIDTH).requires_grad_(), torch.randn(50, WIDTH)
    whole = call_next_token(batch, hidden_TD, weight_VD, 50, group)
    seen = torch.zeros(24)
    total = 0.0
    for part in range(4):
        hidden_TD.grad = None
        loss = call_next_token(batch, hidden_TD, weight_VD, 50, group, share=(part, 4))
        loss.backward()
        total += loss.item()
        seen += (hidden_TD.grad.abs().sum(-1) > 0).float()
    assert total == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(seen, (batch.labels_T != IGNORE).float())


def test_next_token_does_not_depend_on_the_split(group):
    torch.manual_seed(0)
    documents = [document(number, 50, seed) for seed, number in enumerate((3, 0, 8, 2))]
    hidden_TD, weight_VD = torch.randn(32, WIDTH), torch.randn(50, WIDTH)
    whole = call_next_token(micro_batch(documents, 0), hidden_TD, weight_VD, 50, group)
    split = sum(
        call_next_token(micro_batch([one], 0), hidden_TD[8 * i : 8 * i + 8], weight_VD, 50, group).item()
        for i, one in enumerate(documents)
    )
    assert whole.item() == pytest.approx(split, rel=1e-6)
