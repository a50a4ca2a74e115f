"""Variables that another job has left behind: one line that names them, and no wait."""

import os
import socket
import subprocess
import sys

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.megatron.environment import check_environment

GOOD = {
    "nothing": {},
    "one process": {"RANK": "0", "WORLD_SIZE": "1"},
    "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"},
}
BAD = {
    "no port": ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_PORT"),
    "rank alone": ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
    "rank beyond": ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK=2 is not below WORLD_SIZE=2"),
    "rank negative": ({"RANK": "-1"}, "RANK='-1' is no whole number"),
    "port a word": ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is no whole number"),
    "port empty": ({"MASTER_PORT": ""}, "MASTER_PORT='' is no whole number"),
    "port too high": ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    "size zero": ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not at least 1"),
    "local rank a word": ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is no whole number"),
}


@pytest.mark.parametrize("environment", GOOD.values(), ids=GOOD)
def test_accepted(environment):
    check_environment(environment)


@pytest.mark.parametrize(("environment", "message"), BAD.values(), ids=BAD)
def test_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        check_environment(environment)


def test_a_taken_port():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                "from laver_mcore.megatron.parallel import init_distributed; init_distributed()",
            ],
            env=os.environ | {"MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode != 0
    assert f"ConfigError: MASTER_PORT={port} cannot be used" in run.stderr
