"""Tuning: what counts as the best tile, how it reaches the table, and the short list itself."""

import dataclasses
from pathlib import Path

import pytest

from laver_kernels import configs


def test_tuning_keeps_the_fastest_right_tile_and_writes_it(modules, tmp_path):
    """A tile that is wrong, or that does not compile, does not count, however fast."""
    tune, key = modules.tune, ("sm_90", "forward", 128)
    table = dict(configs.ATTENTION)
    slower, right, wrong, refused = (configs.Tile(rows=64, columns=32, num_stages=n) for n in (1, 2, 3, 4))
    milliseconds = {table[key]: 3.0, slower: 4.0, right: 2.0, wrong: 1.0}
    best = tune.tune(
        table,
        key,
        [slower, right, wrong, refused],
        lambda: table[key] != wrong,
        lambda: milliseconds[table[key]],  # a KeyError stands for what the compiler says
    )
    assert best == table[key] == right
    copy = tmp_path / "configs.py"
    copy.write_text(Path(configs.__file__).read_text())
    tune.write(copy, key, best)
    names = {"__name__": "configs_written"}
    exec(copy.read_text(), names)
    changed = {
        k for k, tile in names["ATTENTION"].items() if dataclasses.asdict(tile) != vars(configs.ATTENTION[k])
    }
    assert changed == {key}
    assert vars(names["ATTENTION"][key]) == vars(best)


def test_the_short_list_is_a_part_of_all_tiles(modules):
    tune = modules.tune
    kernels = [(configs.ATTENTION, key, tune.attention_candidates) for key in tune.SHORT_LIST]
    kernels += [(configs.GRAM, key, tune.gram_candidates) for key in tune.GRAM_SHORT_LIST]
    for table, key, candidates in kernels:
        short, whole = (list(candidates(*key, is_all)) for is_all in (False, True))
        assert len(set(short)) == len(short)
        assert set(short) <= set(whole)
        assert key in table


def test_every_kernel_is_tuned_and_written(modules, tmp_path, monkeypatch, capsys):
    """The wiring alone: nothing is timed, and each kernel's first candidate is said to be the fastest."""
    pytest.importorskip("triton")
    tune = modules.tune
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.configs, "architecture", lambda device: "sm_90")
    for name in ("attention_workload", "gram_workload", "attention_problem", "gram_problem"):
        monkeypatch.setattr(tune, name, lambda *arguments, **more: None)
    monkeypatch.setattr(tune, "_is_right", lambda problem: True)
    monkeypatch.setattr(tune, "_timer", lambda *arguments: iter((3.0, 2.0, *[4.0] * 9)).__next__)
    for table in ("ATTENTION", "GRAM"):
        monkeypatch.setattr(configs, table, dict(getattr(configs, table)))
    before = Path(configs.__file__).read_text()
    monkeypatch.setattr(tune, "CONFIGS", tmp_path / "configs.py")
    tune.CONFIGS.write_text(before)
    assert tune.main(["--write"]) == 0
    changed = set(tune.CONFIGS.read_text().splitlines()) - set(before.splitlines())
    wanted = [key for key in (*tune.SHORT_LIST, *tune.GRAM_SHORT_LIST) if key[0] == "sm_90"]
    assert len(changed) == len(wanted) == 8
    assert all('("sm_90"' in line for line in changed)
    assert capsys.readouterr().out.count("head_splits") == 4
