"""Adapters against the formula of LoRA in fp64, projection by projection; what trains, how it begins and is cut."""

import fnmatch
import warnings

import pytest
import torch

from laver_mcore.config.checks import check
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse
from laver_mcore.config.trainable import trains
from laver_mcore.megatron import parallel
from laver_mcore.model.initialize import draw, initialize
from laver_mcore.model.lora import without_dropout
from laver_mcore.model.parameters import named_parameters
from laver_mcore.model.sharding import shard
from laver_mcore.train.build import build_chunks

HEADS, GROUPS, CHANNELS, WIDTH, FFN, RANK, ALPHA = 6, 2, 8, 48, 40, 3, 12.0
FLAGS = (
    f"--model tiny --vision none --objective lm --num-layers 1 --hidden-size {WIDTH} --ffn-hidden-size {FFN} "
    f"--num-attention-heads {HEADS} --num-query-groups {GROUPS} --kv-channels {CHANNELS} --lora-rank {RANK} "
    f"--lora-alpha {ALPHA} --data-path none --tokenizer-model none"
)


def layer_of(flags=""):
    """The one decoder layer, its adapters at random."""
    warnings.filterwarnings("ignore")
    config, _ = parse([*FLAGS.split(), *flags.split()])
    topology = parallel.build_topology(config.parallel, parallel.init_distributed())
    chunks = build_chunks(config, topology, 64)
    initialize(chunks, config, 64, topology)
    for item in named_parameters(chunks, topology):
        if item.name.endswith("lora_b"):
            torch.nn.init.normal_(item.parameter)
    return chunks[0].decoder.layers[0]


def delta(layer, x):
    """What the adapter adds: the layer's output without its matrix and bias."""
    with torch.no_grad():
        layer.weight.zero_()
        if getattr(layer, "bias", None) is not None:
            layer.bias.zero_()
    return layer(x)[0]


def low_rank(x, a, b):
    return ALPHA / RANK * (x.double() @ a.double().T) @ b.double().T


@pytest.mark.parametrize("name", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
def test_each_projection_has_its_own_adapter(name):
    """Rows of the fused matrix: the query heads of a key group, its key, its value; or all of gate, then all of up."""
    block = layer_of()
    layer = getattr(block.self_attention if name in ("linear_qkv", "linear_proj") else block.mlp, name)
    x = torch.randn(5, 1, layer.weight.shape[1])
    a, b = layer.lora_a.detach(), layer.lora_b.detach()
    if name == "linear_qkv":
        per_group = HEADS // GROUPS
        wanted = []
        for row in range(len(b)):
            head = row // CHANNELS % (per_group + 2)
            kind = 0 if head < per_group else head - per_group + 1
            wanted.append(low_rank(x, a[kind * RANK : (kind + 1) * RANK], b[row : row + 1]))
        wanted = torch.cat(wanted, -1)
    elif name == "linear_fc1":
        wanted = torch.cat([low_rank(x, a[:RANK], b[:FFN]), low_rank(x, a[RANK:], b[FFN:])], -1)
    else:
        wanted = low_rank(x, a, b)
    torch.testing.assert_close(delta(layer, x).double(), wanted, atol=1e-5, rtol=1e-5)


ROWS = {
    "q_proj": [0, 1, 2, 5, 6, 7],
    "k_proj": [3, 8],
    "v_proj": [4, 9],
    "gate_proj": range(FFN // CHANNELS),
    "up_proj": range(FFN // CHANNELS, 2 * FFN // CHANNELS),
}
"""Projections -> where their rows lie in the fused matrix, in heads (of 8 rows) from the top."""


@pytest.mark.parametrize(
    "targets", ["q_proj v_proj", "k_proj", "v_proj k_proj", "gate_proj", "up_proj", "[kv]_proj"]
)
def test_projections_may_have_adapters_alone(targets):
    """As peft's `target_modules`: rows of projections without an adapter get nothing, in whatever order they lie."""
    block = layer_of(f"--lora-targets {targets}")
    layer = block.mlp.linear_fc1 if "gate" in targets or "up" in targets else block.self_attention.linear_qkv
    names = [name for name in ROWS if any(fnmatch.fnmatchcase(name, target) for target in targets.split())]
    x = torch.randn(5, 1, WIDTH)
    a, b = layer.lora_a.detach(), layer.lora_b.detach()
    assert (len(a), len(b)) == (RANK * len(names), CHANNELS * sum(len(ROWS[name]) for name in names))
    owners = sorted((head, index) for index, name in enumerate(names) for head in ROWS[name])
    found = delta(layer, x).double()
    wanted = torch.zeros_like(found)
    for place, (head, index) in enumerate(owners):  # rows of B lie in the order of the rows of the matrix
        rows = slice(CHANNELS * head, CHANNELS * (head + 1))
        own = b[CHANNELS * place : CHANNELS * (place + 1)]
        wanted[..., rows] = low_rank(x, a[RANK * index : RANK * (index + 1)], own)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_dropout_is_off_for_the_teacher_and_in_evaluation():
    block = layer_of("--lora-dropout 0.5")
    layer, x = block.mlp.linear_fc2, torch.randn(64, 1, FFN)
    dropped = delta(layer, x)
    whole = low_rank(x, layer.lora_a.detach(), layer.lora_b.detach())
    assert (dropped.double() - whole).abs().max() > 0.1
    with without_dropout(block):
        torch.testing.assert_close(layer(x)[0].double(), whole, atol=1e-5, rtol=1e-5)
    assert (layer(x)[0].double() - whole).abs().max() > 0.1
    block.eval()
    torch.testing.assert_close(layer(x)[0].double(), whole, atol=1e-5, rtol=1e-5)


def test_targets_choose_layers():
    block = layer_of("--lora-targets *_qkv linear_fc2")
    adapted = {name.rpartition(".")[0] for name, _ in block.named_parameters() if name.endswith("lora_a")}
    assert adapted == {"self_attention.linear_qkv", "mlp.linear_fc2"}


def test_what_trains_of_a_decoder_with_adapters():
    everything, connector = ("*",), ("connector.*", "language_model.decoder.layers.*.linear_qkv.*")
    layer = "language_model.decoder.layers.0.self_attention.linear_qkv."
    names = (
        f"{layer}weight",
        f"{layer}lora_a",
        "language_model.embedding.word_embeddings.weight",
        "connector.x",
    )
    assert [trains(name, everything, lora=True) for name in names] == [False, True, False, True]
    assert [trains(name, everything, lora=False) for name in names] == [True] * 4
    assert [trains(name, ("connector.*",), lora=True) for name in names] == [False, False, False, True]
    assert trains(f"{layer}lora_b", ("*.lora_b",), lora=True)
    assert not trains(f"{layer}weight", connector, lora=True)


def test_adapters_begin_with_nothing_to_say():
    config, _ = parse(FLAGS.split())
    name = "language_model.decoder.layers.0.mlp.linear_fc1."
    assert draw(f"{name}lora_b", (80, 3), config.model, 1).abs().sum() == 0
    a = draw(f"{name}lora_a", (300, 100), config.model, 1)
    assert 0.098 < a.abs().max() <= 0.1  # peft's: uniform within 1 / sqrt(inputs)
    assert a.std() == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_rows_of_b_are_cut_like_the_matrix():
    full = torch.arange(16.0).reshape(8, 2)
    for name, wanted in (("linear_fc1", [0, 1, 4, 5]), ("linear_qkv", [0, 1, 2, 3])):
        part = shard(full, f"language_model.decoder.layers.0.x.{name}.lora_b", 0, 0, 2)
        assert part[:, 0].div(2).int().tolist() == wanted


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-rank -1", "lora_rank=-1 must not be negative"),
        ("--lora-alpha 0", "lora_alpha=0.0 must be positive"),
        ("--lora-dropout 1", "lora_dropout=1.0 must be from 0 to below 1"),
        (
            "--lora-targets query_proj",
            "lora_targets pattern 'query_proj' matches no layer; there are linear_qkv, linear_proj",
        ),
        ("--transformer-impl transformer_engine", "adapters stand beside Megatron's local layers"),
    ],
)
def test_what_cannot_run_is_said(flags, words):
    with pytest.raises(ConfigError, match=words):
        parse([*FLAGS.split(), *flags.split()])
    check(parse(FLAGS.split())[0])
