"""What the profiler's flags refuse, in one line, before anything runs."""

from pathlib import Path

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse

RECIPE = Path(__file__).resolve().parents[3] / "examples/qwen2.5-7b-siglip2/stage2.yaml"
REFUSED = {
    "nowhere_to_write": ("--profile", "give save"),
    "empty_range": (
        "--profile --save runs/x --profile-step-start 5 --profile-step-end 5",
        "the end is not traced",
    ),
    "from_zero": (
        "--profile --save runs/x --profile-step-start 0",
        "profile_step_start=0 must be at least 1",
    ),
    "history_alone": ("--record-memory-history", "add profile"),
    "no_rate": ("--peak-tflops 0", "must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    flags, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as error:
        parse(["--config", str(RECIPE), *flags.split()])
    assert "\n" not in str(error.value)


def test_accepted():
    flags = "--profile --save runs/x --profile-step-start 3 --profile-step-end 4 --profile-ranks 0 5"
    config, _ = parse(["--config", str(RECIPE), *flags.split()])
    assert config.run.profile_ranks == (0, 5)
