"""Data-parallel ranks share out what they save and load; none holds the optimizer or the teacher of all of them."""

import json

import pytest
from long import LONG

from integration.harness import torchrun

NUM_RANKS = 4
FLAGS = {
    "dp4": "--train-iters 2",
    "dp4_bf16_buckets": "--train-iters 2 --bf16 --overlap-grad-reduce",
    "dp2_tp2": "--train-iters 2 --tensor-model-parallel-size 2",
}


@LONG
@pytest.mark.parametrize("name", FLAGS)
def test_each_rank_holds_its_share_and_gets_it_back(data_directory, tmp_path, name):
    """Three fp32 numbers of a parameter are the optimizer's, one the teacher's; a rank keeps no more than its part."""
    argv = f"--config {data_directory / 'recipe.yaml'} --use-distributed-optimizer {FLAGS[name]}".split()
    done = torchrun(NUM_RANKS, "tests/integration/saving_worker.py", str(tmp_path), *argv)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    dp_size = 2 if "tp2" in name else 4
    for rank in ranks:
        assert rank["compared"] > 50 and rank["different"] == 0
        for moment in ("saving", "loading"):
            assert rank[moment] <= rank["whole"] / dp_size + rank["largest"], (moment, ranks)
    # Together they have all of it, once: the optimizer has everything, the teacher the decoder and the heads.
    total = sum(rank["saving"] for rank in ranks) / (NUM_RANKS / dp_size)
    assert 0.75 * ranks[0]["whole"] < total <= ranks[0]["whole"]
