"""What the comparison trains and what it makes of the numbers."""

import json
from pathlib import Path

import pytest

from laver_mcore.config.load import parse
from tools import compare_objectives
from tools.compare_objectives import Arguments, arms_of, draw, reached, step_seconds, table, train_all

ROOT = Path(__file__).resolve().parents[3]


def found():
    rows = {}
    for place, arm in enumerate(arms_of(Arguments(viral_target=Path("dino")))):
        rows[arm.name] = dict(
            title=arm.title,
            accuracy=0.5 + place / 100,
            lm_loss=1.25,
            similarity=[0.25, 0.5 + place / 10],
            step_seconds=0.5 + place,
            peak_bytes=3 * 2**20,
        )
    return rows


@pytest.mark.parametrize("arm", arms_of(Arguments(viral_target=Path("dino"))), ids=lambda arm: arm.name)
def test_every_arm_is_the_recipe_with_another_objective(arm, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 32}')
    flags = [str(tmp_path) if flag == "dino" else flag for flag in arm.flags]
    config, _ = parse(["--config", str(ROOT / "examples/demo/stage2.yaml"), *flags])
    assert config.objective.name == arm.name.split("_")[0]
    assert config.vision.normalize_visual_tokens == (arm.align != "stage1")
    if arm.name.startswith("laver"):
        assert config.objective.gram == {"mim": "off", "ga": "ga", "cga": "cga"}[arm.name.split("_")[1]]


def test_viral_is_left_out_without_a_target():
    assert "viral" not in {arm.name for arm in arms_of(Arguments())}


def test_arms_take_turns_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    """Two arms of seven steps in three turns, one of them stopped after its first."""
    called = []

    def run(*command):
        save = Path(command[command.index("--save") + 1])
        save.mkdir(exist_ok=True)
        each = int(command[command.index("--exit-interval") + 1]) if "--exit-interval" in command else 7
        at = min(reached(save) + each, 7)
        (save / "latest_checkpointed_iteration.txt").write_text(str(at))
        called.append((save.name, "--load" in command, at))
        return 5

    monkeypatch.setattr(compare_objectives, "run", run)
    arguments = Arguments(output=tmp_path, steps=7, turns=3)
    arms = arms_of(arguments)[:2]
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "latest_checkpointed_iteration.txt").write_text("3")
    train_all(arguments, arms)
    assert called == [
        ("stage1", False, 7),
        ("laver_mim", False, 3),
        ("lm", True, 6),
        ("laver_mim", True, 6),
        ("lm", True, 7),
        ("laver_mim", True, 7),
    ]
    assert json.loads((tmp_path / "lm" / "memory.json").read_text()) == {"peak_bytes": 5}


def test_first_steps_of_a_turn_do_not_count(tmp_path):
    times = [9, 9, 9, 1, 2, 9, 9, 9, 3, 4]
    rows = [{"iteration": i + 1, "step_seconds": seconds} for i, seconds in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert step_seconds(tmp_path, 5) == 2.5


def test_the_table_has_a_row_for_each_and_times_over_the_first():
    lines = table(found()).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("| LM alone | 50.0% | 1.250 | 0.250 | 0.500 | 1.00 | 3 MiB |")
    assert "| 3.00 | 3 MiB |" in lines[3]


def test_the_picture_is_drawn(tmp_path):
    draw(tmp_path / "report.png", found())
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
