"""The teacher's shards: equal to a plain fp64 average of the weights after 200 steps, and as small as promised."""

import json

import pytest
from long import LONG

from integration.harness import torchrun

pytestmark = LONG  # eight ranks
SCENARIOS = {
    "tp2_pp2_dp2": "--train-iters 200 --momentum 0.99 --momentum-strategy constant --lr 1e-3 --global-batch-size 2 "
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "tp2_dp4_bf16": "--train-iters 1 --bf16 --global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel "
    "--trainable language_model.* vision_head.*",
}
NUM_RANKS = 8


@pytest.fixture(scope="module")
def reports(data_directory, tmp_path_factory):
    """What each of eight ranks found out, by scenario."""
    directory = tmp_path_factory.mktemp("teacher")
    common = f"--config {data_directory / 'recipe.yaml'} --use-distributed-optimizer --ema-steps 1 --log-interval 50"
    plan = {name: f"{common} {flags}".split() for name, flags in SCENARIOS.items()}
    (directory / "plan.json").write_text(json.dumps(plan))
    done = torchrun(
        NUM_RANKS,
        "tests/integration/teacher_worker.py",
        str(directory),
        str(directory / "plan.json"),
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return {
        name: [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in range(NUM_RANKS)]
        for name in SCENARIOS
    }


def test_equals_a_plain_average_after_200_steps(reports):
    apart = {name: far for report in reports["tp2_pp2_dp2"] for name, far in report["apart"].items()}
    assert len(apart) > 15
    assert {name: far for name, far in apart.items() if far > 1e-6} == {}


def test_memory_is_four_bytes_over_dp_and_a_compute_copy(reports):
    """Bytes of real tensors on four data-parallel ranks, bf16: 4 / DP + 2 for each averaged parameter of a rank."""
    ranks = reports["tp2_dp4_bf16"]
    assert {report["averaged"] for report in ranks} == {ranks[0]["averaged"]}
    averaged = ranks[0]["averaged"]
    assert averaged > 10_000
    for tp_rank in range(2):
        assert sum(report["average_bytes"] for report in ranks[tp_rank::2]) == 4 * averaged
    for report in ranks:
        assert report["num_bytes"] == report["average_bytes"] + 2 * averaged
    # Shards are even but for Megatron's padding between parameters.
    assert max(report["average_bytes"] for report in ranks) <= 1.05 * 4 * averaged / 4
