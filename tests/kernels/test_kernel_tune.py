"""Tuning: what counts as the best tile, how it reaches the table, and the short list itself."""

import dataclasses
from pathlib import Path

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
    for kernel, head_dim in modules.tune.SHORT_LIST:
        short, whole = (
            list(modules.tune.attention_candidates(kernel, head_dim, is_all=is_all))
            for is_all in (False, True)
        )
        assert len(set(short)) == len(short)
        assert set(short) <= set(whole)
        assert ("sm_90", kernel, head_dim) in configs.ATTENTION
