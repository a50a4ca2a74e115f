"""Counts of a step against dense masks, and FLOPs against the well-known approximation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.memory import holdings
from laver_mcore.accounting.work import StepWork, micro_batch_work
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import (
    AttentionConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    VisionConfig,
)
from laver_mcore.objectives.laver import LaverConfig
from laver_mcore.shapes.towers import tower_shape
from laver_mcore.shapes.weights import list_weights, padded_vocab

# Documents as lists of text lengths (int) and image grids (pair).
DOCUMENTS = {
    "text": [[5]],
    "image": [[2, (3, 4), 3]],
    "adjacent_images": [[1, (2, 2), (1, 3), 2], [(2, 3)]],
    "one_token_image": [[(1, 1), 4], [2]],
    "nothing": [],
}


def dense_pairs(documents, mixed):
    """Every (row, column) looked at: same document, and earlier or in the same image."""
    tokens = []
    for number, document in enumerate(documents):
        for place, segment in enumerate(document):
            size = segment if isinstance(segment, int) else segment[0] * segment[1]
            image = None if isinstance(segment, int) or not mixed else (number, place)
            tokens += [(number, image)] * size
    return sum(
        a[0] == b[0] and (j <= i or (a[1] is not None and a[1] == b[1]))
        for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2)
    )


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "causal"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_pairs_of_the_mask(name, mixed):
    documents = DOCUMENTS[name]
    grids = [s for document in documents for s in document if not isinstance(s, int)]
    lengths = [sum(s if isinstance(s, int) else s[0] * s[1] for s in document) for document in documents]
    config = Config(
        attention=AttentionConfig(mixed_attention=mixed),
        objective=LaverConfig(),
        vision=VisionConfig(vision="none"),
    )
    rows = dict(student_rows=sum(lengths) + 99, teacher_rows=128, supervised_rows=3, masked_rows=2)
    work = micro_batch_work(config, document_lengths=lengths, image_grids=grids, **rows)
    assert work.dialogue_pairs == dense_pairs(documents, mixed)
    assert work.reconstruction_pairs == dense_pairs([[grid] for grid in grids], mixed)
    visual = sum(h * w for h, w in grids)
    assert work.visual_tokens == visual
    assert work.student_padding == 99 - visual
    assert work.teacher_padding == 128 - visual


@pytest.mark.parametrize("grid", [(4, 4), (5, 9), (1, 1), (8, 3)], ids=str)
def test_window_pairs(grid):
    """Windows of 4 x 4 merged tokens, numbered and compared patch by patch."""
    vision = VisionConfig(vision="qwen2.5-vl")
    shape = tower_shape(vision)
    work = micro_batch_work(
        Config(vision=vision), document_lengths=[grid[0] * grid[1]], image_grids=[grid],
        student_rows=grid[0] * grid[1], teacher_rows=0, supervised_rows=0, masked_rows=0,
    )  # fmt: skip
    rows, columns = np.indices((grid[0] * shape.merge, grid[1] * shape.merge)) // (shape.window * shape.merge)
    window = (rows * 1000 + columns).flatten()
    assert work.window_pairs == (window[:, None] == window[None]).sum()
    assert work.patch_pairs == window.size**2


def test_work_adds_up():
    one = StepWork(dialogue_rows=3, images=1)
    assert one + one == StepWork(dialogue_rows=6, images=2)


@pytest.mark.parametrize(("student", "teacher", "share"), [(0, 0, 0.0), (100, 0, 0.2), (60, 40, 0.2)])
def test_padding_share(student, teacher, share):
    work = StepWork(dialogue_rows=200, visual_tokens=100, reconstruction_pairs=1)
    work = replace(work, student_padding=student, teacher_padding=teacher)
    assert work.padding_share == pytest.approx(share)


def text_only(name, trainable=("*",)):
    return Config(
        model=fill_from_preset(ModelConfig(model=name)),
        vision=VisionConfig(vision="none"),
        train=TrainConfig(trainable=trainable),
    )


# Published parameters of the language models (all, and without embeddings), model cards.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "vicuna-7b": 6_738_415_616,
    "vicuna-13b": 13_015_864_320,
    "llama3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    config = text_only(name)
    assert sum(w.size for w in list_weights(config, config.model.vocab_size)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("vocabulary", "tp", "rows"),
    [(151936, 1, 151936), (151936, 2, 152064), (152064, 2, 152064), (96, 1, 128), (129, 8, 1024)],
)
def test_padded_vocabulary(vocabulary, tp, rows):
    """Whole multiples of 128 on every tensor-parallel rank."""
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=tp))
    assert padded_vocab(vocabulary, config) == rows


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b"])
def test_two_stages_hold_a_tied_embedding_twice(name):
    config = replace(text_only(name), parallel=ParallelConfig(pipeline_model_parallel_size=2))
    shape = config.model
    copy = 0 if shape.untie_embeddings_and_output_weights else shape.vocab_size * shape.hidden_size
    assert sum(held.all for held in holdings(config, shape.vocab_size)) == PUBLISHED[name] + copy


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-72b"])
def test_six_flops_per_parameter_and_token(name):
    """6 P T without attention, where P leaves out the embedding, which multiplies nothing."""
    config, tokens = text_only(name), 4096
    embedding = config.model.vocab_size * config.model.hidden_size
    work = StepWork(dialogue_rows=tokens, supervised_rows=tokens)
    flops = step_flops(config, config.model.vocab_size, work).total
    assert flops.model == pytest.approx(6 * (PUBLISHED[name] - embedding) * tokens, rel=1e-3)
    assert flops.hardware == flops.model


def test_causal_attention_is_half_the_square():
    """12 L D T^2 forward and backward over a whole square (PaLM's estimate), half of it under a causal mask."""
    config, tokens = text_only("qwen2.5-7b"), 4096
    model = config.model
    with_pairs = StepWork(dialogue_rows=tokens, dialogue_pairs=tokens * (tokens + 1) // 2)
    both = [
        step_flops(config, model.vocab_size, replace(with_pairs, dialogue_pairs=p))
        for p in (with_pairs.dialogue_pairs, 0)
    ]
    attention = both[0].total.model - both[1].total.model
    assert attention == pytest.approx(12 * model.num_layers * model.hidden_size * tokens**2 / 2, rel=1e-3)


def test_frozen_decoder_costs_a_third_less():
    """Stage 1 trains the connector alone: two products per weight of the decoder, not three."""
    work = StepWork(dialogue_rows=4096, visual_tokens=729, images=1, patches=729)
    config = resolve(from_recipe("examples/qwen2.5-7b-siglip2/stage2.yaml"))
    frozen = replace(config, train=replace(config.train, trainable=("connector.*",)))
    whole, part = (step_flops(c, 152064, work).dialogue.model for c in (config, frozen))
    assert part == pytest.approx(2 / 3 * whole)
    assert step_flops(
        replace(config, train=replace(config.train, trainable=("vision_head.*",))), 152064, work
    ).dialogue.model == pytest.approx(whole / 3)
