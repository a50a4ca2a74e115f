"""The parts of the training benchmark: batches, masks, agreements and the account, against written-out oracles."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch

from laver_mcore.config.errors import ConfigError
from tools.benchmark_training import chosen_arms
from tools.training_benchmark import measure, report
from tools.training_benchmark.account import account
from tools.training_benchmark.batches import IMAGE_TOKEN, global_batch, packed, padded
from tools.training_benchmark.equality import Agreement, agreements
from tools.training_benchmark.released import image_mask, mixed_mask
from tools.training_benchmark.setting import Setting, engine_config, preset

SETTING = preset("tiny", cuda=False)
VOCABULARY = 512


@pytest.fixture(scope="module")
def micro_batch():
    return global_batch(SETTING, VOCABULARY, 0)[0]


def test_packed_and_padded_hold_the_same_tokens_labels_and_positions(micro_batch):
    engine, released = packed(micro_batch, SETTING), padded(micro_batch, SETTING, 0)
    real = released.is_real_BL
    length = sum(engine.document_lengths)
    assert engine.num_samples == len(real) >= 2
    assert torch.equal(engine.tokens_T[:length], released.ids_BL[real])
    assert torch.equal(engine.layout.positions_3S[:, :length], released.positions_3BL[:, real])
    # The engine's labels stand where they are predicted, the padded ones at their own places.
    shifted = torch.full_like(released.labels_BL, -100)
    shifted[:, :-1] = released.labels_BL[:, 1:]
    assert torch.equal(engine.labels_T[:length], shifted[real])
    assert torch.equal(released.image_BL >= 0, released.ids_BL == IMAGE_TOKEN)


def test_the_released_masks_are_the_engines_intervals(micro_batch):
    engine, released = packed(micro_batch, SETTING), padded(micro_batch, SETTING, 0)
    it = engine.layout.intervals
    start = 0
    for row, length in enumerate(engine.document_lengths):
        rows = slice(start, start + length)
        column_L = torch.arange(start, start + length)
        sees = (column_L >= it.row_lo_T[rows, None]) & (column_L < it.row_hi_T[rows, None])
        assert torch.equal(mixed_mask(released)[row, :length, :length], sees)
        is_image = released.image_BL[row, :length] >= 0
        alone = image_mask(released)[row, :length, :length][is_image]
        assert torch.equal(alone, is_image.expand_as(alone))
        start += length


def test_padding_sees_something_and_is_seen_by_nobody(micro_batch):
    released = padded(micro_batch, SETTING, 0)
    for mask in (mixed_mask(released), image_mask(released)):
        assert mask.any(-1).all()
        others = mask & ~torch.eye(mask.shape[-1], dtype=torch.bool)
        assert not (others & ~released.is_real_BL[:, None, :]).any()


def test_every_global_batch_is_its_own_and_the_same_each_time():
    first, again = (global_batch(SETTING, VOCABULARY, 0)[0] for _ in range(2))
    other = global_batch(SETTING, VOCABULARY, 1)[0]
    assert torch.equal(first.pixels, again.pixels)
    assert (first.samples[0].token_ids_L == again.samples[0].token_ids_L).all()
    assert not torch.equal(first.pixels[:1], other.pixels[:1])


LOSSES = {
    "lm": {"lm": 6.0, "mim": None, "gram": None, "grad_norm": 2.0},
    "laver": {"lm": 6.0, "mim": 14.0, "gram": 3e-4, "grad_norm": 9.0},
    "released": {"lm": 6.0, "mim": 14.0, "gram": 3e-4, "grad_norm": 9.0},
}


def test_an_lm_only_run_shares_its_lm_loss_alone():
    found = [(a.quantity, *a.arms) for a in agreements(LOSSES, bf16=False)]
    assert found == [
        ("lm", "lm", "laver"),
        ("lm", "lm", "released"),
        ("lm", "laver", "released"),
        ("mim", "laver", "released"),
        ("gram", "laver", "released"),
        ("grad_norm", "laver", "released"),
    ]
    assert all(a.holds for a in agreements(LOSSES, bf16=False))


@pytest.mark.parametrize(
    ("quantity", "value"),
    [("lm", 6.001), ("mim", 14.01), ("gram", 3.01e-4), ("gram", 0.0), ("grad_norm", 9.1), ("mim", math.nan)],
)
def test_one_wrong_quantity_is_found(quantity, value):
    wrong = LOSSES | {"laver": LOSSES["laver"] | {quantity: value}}
    failed = [a for a in agreements(wrong, bf16=False) if not a.holds]
    assert {a.quantity for a in failed} == {quantity}


def test_both_zero_agree():
    assert Agreement(quantity="gram", arms=("laver", "released"), values=(0.0, 0.0), tolerance=1e-3).holds


def test_the_account_follows_the_methods_formula_where_matrices_dominate():
    """3 T + 7 N against 3 (T + N) and 7 (T + N) passes over text T and visual tokens N."""
    setting = Setting(
        model="qwen2.5-7b", num_layers=28, image_side=4, text_tokens=16, seq_length=1024, num_batches=1,
        vision_head_hidden_size=8,
    )  # fmt: skip
    accounts = {arm: account(arm, setting) for arm in ("lm", "laver", "released")}
    visual = accounts["lm"].images * 16
    text = accounts["lm"].dialogue_tokens - visual
    model = engine_config(setting, laver=True).model
    # Weights of a layer that multiply every row: q, o; k, v; gate, up, down.
    layer = model.hidden_size * (2 * model.hidden_size + 2 * 4 * 128 + 3 * model.ffn_hidden_size)
    head = 3 * 2 * model.vocab_size * model.hidden_size
    one_pass = 2 * 28 * layer
    supervised = sum(
        (sample.labels_L >= 0).sum()
        for batch in global_batch(setting, model.vocab_size, 0)
        for sample in batch.samples
    )
    assert accounts["lm"].useful_flops == pytest.approx(
        one_pass * 3 * (text + visual) + head * supervised, rel=0.02
    )
    more = accounts["laver"].useful_flops - accounts["lm"].useful_flops
    assert more == pytest.approx(one_pass * 4 * visual, rel=0.02)
    padded_rows = accounts["released"].packed_rows / 3
    assert padded_rows >= text + visual
    wanted = one_pass * 7 * padded_rows + head * padded_rows
    assert accounts["released"].executed_flops == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seq_length=100), "seq_length=100, but a sample has up to 109 tokens"),
        (dict(global_batch_size=3), "global_batch_size=3 is no multiple of micro_batch_size=2"),
        (dict(text_tokens=1), "text_tokens=1"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SETTING, **changes).check()


class DyingProcess:
    """An arm that answers at once, or dies at one command."""

    def __init__(self, arm: str, dies: dict[str, str]) -> None:
        self._arm, self._dies = arm, dies

    def wait_until_built(self) -> None: ...

    def ask(self, do: str, count: int = 1, **_) -> dict:
        if self._dies.get(self._arm) == do:
            raise measure.ArmError(f"at {do!r}: out of memory")
        answers = {"losses": LOSSES[self._arm], "memory": {"peak_bytes": 7}, "count": {"flops": None}}
        return answers.get(do) or {"seconds": [0.5] * count, "clock": "wall"}


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.parametrize("dies_at", ["losses", "steps", "memory"])
@pytest.mark.parametrize("dying", ["lm", "laver", "released"])
def test_an_arm_that_dies_takes_no_numbers_along(dying, dies_at, one_at_a_time, monkeypatch, tmp_path):
    monkeypatch.setattr(
        measure,
        "running",
        lambda arm, *_: contextlib.nullcontext(DyingProcess(arm, {dying: dies_at})),
    )
    plan = measure.Plan(
        arms=("lm", "laver", "released"), warmup=1, steps=2, rounds=2, one_at_a_time=one_at_a_time, profile=0
    )
    accounts = {arm: account(arm, SETTING) for arm in plan.arms}
    said, output = [], tmp_path / "result.json"

    def keep(results):
        report.keep(report.report(SETTING, {"device": "cpu"}, "command", results, accounts), output)

    results = measure.measure(SETTING, plan, tmp_path, said.append, lambda found: None, keep)
    assert [line for line in said if "left out" in line] == [
        f"{dying}: left out; it died at {dies_at!r}: out of memory"
    ]
    assert set(results.measured) == set(plan.arms) - {dying} and set(results.left_out) == {dying}
    written = json.loads(output.read_text())
    assert {row["arm"]: row["timed_steps"] for row in written["arms"]} == {
        arm: 4 for arm in plan.arms if arm != dying
    }
    if not (one_at_a_time and dying == "released"):  # it was the last, and nothing was known after it
        assert set(written["left_out"]) == {dying}


def test_the_reason_is_the_line_that_names_the_error():
    log = "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried 3 GiB\n[W] process group was not destroyed\n"
    assert measure.reason(log) == "torch.OutOfMemoryError: CUDA out of memory. Tried 3 GiB"
    assert measure.reason("killed\n\n") == "killed"


def test_arms_are_chosen_by_name():
    assert chosen_arms("released,lm") == ("lm", "released")
    with pytest.raises(ValueError, match="'lmm' is none; use lm, laver, released"):
        chosen_arms("lmm")
