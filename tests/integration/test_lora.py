"""LoRA: the same training under every layout, adapters alone in memory and on disk, and what comes out of it."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from long import LONG
from safetensors.torch import load_file
from sample_decoders import random_decoder
from sample_run import PATCH_SIZE, write_recipe, write_sample_data

from integration.harness import Scenario, read_checkpoint, read_metrics, run_scenarios
from laver_mcore.accounting.memory import holdings
from laver_mcore.config.load import parse
from laver_mcore.convert.decoder import open_run
from laver_mcore.convert.export import export_run
from laver_mcore.convert.probe import probe, text_batch
from laver_mcore.megatron import parallel
from laver_mcore.shapes.weights import list_weights
from laver_mcore.train.build import build_network

DECODER = (
    "--hf-path {directory}/{name} --num-layers None --hidden-size None --ffn-hidden-size None --family None"
)
LORA = "--lora-rank 4 --lora-alpha 8 --adam-eps 1e-3 --lr 1e-2 --trainable language_model.* connector.* objective"
# Name -> (ranks, decoder, flags).
RUNS = {
    "tp1": (1, "qwen3", ""),
    "recompute": (1, "qwen3", "--recompute-granularity full"),
    "tp2": (2, "qwen3", "--tensor-model-parallel-size 2"),
    "tp2_sp": (2, "qwen3", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "qwen3", "--pipeline-model-parallel-size 2"),
    "dp2_distributed": (2, "qwen3", "--use-distributed-optimizer"),
    "cp2": (2, "qwen3", "--context-parallel-size 2"),
    "vicuna_tp1": (1, "vicuna", "--objective lm"),
    "vicuna_tp2_sp": (2, "vicuna", "--objective lm --tensor-model-parallel-size 2 --sequence-parallel"),
    "victor_tp1": (1, "qwen2", "--objective victor --pool-size 64"),
    "victor_pp2": (2, "qwen2", "--objective victor --pool-size 64 --pipeline-model-parallel-size 2"),
    "some": (1, "qwen3", "--objective lm --lora-targets q_proj v_proj up_proj"),
    "some_tp2": (
        2,
        "qwen3",
        "--objective lm --lora-targets q_proj v_proj up_proj --tensor-model-parallel-size 2",
    ),
    "dropout": (1, "qwen3", "--objective lm --lora-dropout 0.5"),
    "half": (2, "qwen3", "--tensor-model-parallel-size 2 --exit-interval 2 --use-distributed-optimizer"),
    "still": (1, "qwen3", "--lr 0 --save-frozen"),
    "twenty": (1, "qwen3", "--train-iters 20 --save-frozen"),
    "twenty_distributed": (2, "qwen3", "--train-iters 20 --save-frozen --use-distributed-optimizer --bf16"),
    "still_bf16": (1, "qwen3", "--lr 0 --save-frozen --bf16"),
}
SAME = {
    **{name: "tp1" for name in ("recompute", "tp2", "tp2_sp", "pp2", "dp2_distributed", "cp2")},
    "vicuna_tp2_sp": "vicuna_tp1",
    "victor_pp2": "victor_tp1",
    "some_tp2": "some",
    "resumed": "tp1",
}


def argv_of(directory, name):
    _, decoder, flags = RUNS[name]
    given = f"--config {directory}/recipe.yaml --train-iters 4 {DECODER} {LORA} {flags}"
    return given.format(directory=directory, name=decoder).split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    write_sample_data(directory, num_samples=24)
    write_recipe(directory)
    for name in ("qwen3", "vicuna", "qwen2"):
        random_decoder(name, layers=2, vocab_size=96, std=0.06).save_pretrained(directory / name)
    for ranks in (1, 2):
        scenarios = [
            Scenario(name=name, argv=tuple(argv_of(directory, name)))
            for name in RUNS
            if RUNS[name][0] == ranks
        ]
        run_scenarios(ranks, directory, scenarios)
    resume = ["--use-distributed-optimizer", "--load", str(directory / "half")]
    run_scenarios(1, directory, [Scenario(name="resumed", argv=(*argv_of(directory, "tp1"), *resume))])
    return directory


@pytest.mark.parametrize("name", SAME)
def test_layouts_train_alike(directory, name):
    wanted = {row["iteration"]: row for row in read_metrics(directory / SAME[name])}
    rows = read_metrics(directory / name)
    assert len(rows) == (2 if name == "resumed" else 4)
    for row in rows:
        for key in ("loss", "lm_loss", "mim_loss", "gram_loss", "grad_norm", "teacher_distance"):
            reference = wanted[row["iteration"]].get(key)
            if reference is not None:
                assert math.isclose(row[key], reference, rel_tol=2e-5, abs_tol=1e-7), (key, row)


@pytest.mark.parametrize("name", ["tp1", "vicuna_tp1", "victor_tp1", "some", "dropout"])
def test_it_learns(directory, name):
    rows = read_metrics(directory / name)
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(("moved", "still"), [("twenty", "still"), ("twenty_distributed", "still_bf16")])
def test_frozen_weights_are_untouched_and_adapters_are_not(directory, moved, still):
    after, before = (read_checkpoint(directory / name, "language_model.") for name in (moved, still))
    assert set(after) == set(before)
    for name, tensor in before.items():
        same = torch.equal(after[name], tensor)
        assert same != name.endswith(("lora_a", "lora_b")), name


def test_checkpoints_hold_adapters_alone(directory):
    config, _ = parse(argv_of(directory, "tp1"))
    weights = list_weights(config, 96)
    found = read_checkpoint(directory / "tp1", "")
    model = {
        k: v
        for k, v in found.items()
        if not k.startswith(("optimizer.", "teacher.", "rng", "centre", "center"))
    }
    trained = sum(w.size for w in weights if w.trains)
    assert 0 < trained < sum(w.size for w in weights) / 2
    assert (
        sum(v.numel() for v in model.values() if v.dim()) - trained <= 96
    )  # what an objective keeps besides
    assert not [k for k in model if k.startswith("language_model.") and not k.endswith(("lora_a", "lora_b"))]
    moments = sum(v.numel() for k, v in found.items() if k.startswith("optimizer.state.exp_avg."))
    assert moments == trained
    averages = sum(v.numel() for k, v in found.items() if k.startswith("teacher."))
    assert averages == sum(w.size for w in weights if w.averaged) > 0


def test_bytes_of_a_rank_are_those_of_the_adapters(directory):
    """Real tensors: gradients, masters and moments of what trains, nothing of what does not."""
    from laver_mcore.train.build import build_engine

    warnings.filterwarnings("ignore")
    config, _ = parse(argv_of(directory, "tp1"))
    topology = parallel.build_topology(config.parallel, parallel.init_distributed())
    engine, _ = build_engine(config, topology, 96)
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    (held,) = holdings(config, 96)
    assert sum(p.numel() for p in parameters) == held.all
    learning = [p for p in parameters if p.requires_grad]
    assert sum(p.numel() for p in learning) == held.trainable
    assert (
        sum(buffer.grad_data.numel() for model in engine.models for buffer in model.buffers)
        <= held.trainable + 1024
    )
    assert all(not hasattr(p, "main_grad") for p in parameters if not p.requires_grad)
    grouped = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in learning}
    assert {id(p) for p in engine.teacher.parameters} < grouped


DOCUMENTS = [list(range(5, 40)), list(range(60, 80))]


def engine_logits(directory, name):
    warnings.filterwarnings("ignore")
    device = parallel.init_distributed()
    config, _ = open_run(directory / name)
    network = build_network(config, parallel.build_topology(config.parallel, device), 96, directory / name)
    batch = replace(text_batch(DOCUMENTS, 64), pixels=torch.empty(0, 3 * PATCH_SIZE**2))
    return probe(network.chunks, batch, network.geometry, network.topology, 96).logits_TV


def their_logits(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in DOCUMENTS])


@pytest.mark.parametrize("name", ["tp1", "vicuna_tp1", "victor_tp1", "some", "twenty"])
def test_merged_weights_compute_what_the_adapted_model_does(directory, name, tmp_path):
    from transformers import AutoModelForCausalLM

    export_run(directory / name, tmp_path / "merged", decoder_only=True)
    wanted = engine_logits(directory, name)
    merged = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    base = their_logits(AutoModelForCausalLM.from_pretrained(directory / RUNS[name][1]).eval())
    assert (wanted[: len(base)] - base).abs().max() > 1e-2
    torch.testing.assert_close(merged, wanted[: len(merged)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tp1", "vicuna_tp1", "some"])
def test_peft_reads_the_adapters(directory, name, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export_run(directory / name, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(directory / RUNS[name][1]).eval()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    wanted = engine_logits(directory, name)
    found = their_logits(model)
    torch.testing.assert_close(found, wanted[: len(found)], atol=1e-5, rtol=1e-5)


def test_adapter_files_by_the_formula(directory, tmp_path):
    """Without peft: W + (alpha / r) B A over the files, projection by projection, is the merged directory."""
    export_run(directory / "tp1", tmp_path / "adapter", adapter=True)
    export_run(directory / "tp1", tmp_path / "merged", decoder_only=True)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["peft_type"]) == (4, 8, "LORA")
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(said["target_modules"]) == projections
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, merged = (
        load_file(folder / "model.safetensors") for folder in (directory / "qwen3", tmp_path / "merged")
    )
    assert len(adapters) == 2 * 7 * 2
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('weight')}lora_"
        if f"{key}A.weight" in adapters:
            weight = weight + 2.0 * adapters[f"{key}B.weight"] @ adapters[f"{key}A.weight"]
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-6)


def test_an_adapter_directory_names_the_projections_that_have_one(directory, tmp_path):
    for name in ("some", "some_tp2"):
        export_run(directory / name, tmp_path / name, adapter=True)
        said = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert said["target_modules"] == ["q_proj", "up_proj", "v_proj"]
        adapters = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {key.split(".")[-3] for key in adapters} == set(said["target_modules"])
        assert len(adapters) == 2 * 3 * 2


@LONG
def test_evaluation_answers_with_adapters_whose_decoder_lies_elsewhere(directory):
    """`tools/evaluate.py` on checkpoints that hold adapters alone: the same answers at every layout, not the base's."""
    answers = {}
    for name, ranks in (("tp1", 1), ("tp1", 2), ("still", 1)):
        out = directory / f"answers_{name}_{ranks}.jsonl"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = ["tools/evaluate.py", "--checkpoint", str(directory / name), "--output", str(out)]
        command += ["--data", str(directory / "train.json"), "--tensor-model-parallel-size", str(ranks)]
        subprocess.run([*launch, *command, "--max-new-tokens", "4"], check=True, timeout=300)
        answers[name, ranks] = out.read_text(encoding="utf-8")
    assert answers["tp1", 1].count("\n") >= 24
    assert answers["tp1", 1] == answers["tp1", 2]
    assert answers["tp1", 1] != answers["still", 1]


def test_the_teacher_of_laver_averages_the_adapters(directory, tmp_path):
    export_run(directory / "tp1", tmp_path / "student", adapter=True)
    export_run(directory / "tp1", tmp_path / "teacher", adapter=True, teacher=True)
    student, teacher = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("student", "teacher"))
    for name, tensor in student.items():
        if "lora_B" in name:  # zero at the start, so the average is behind
            assert 0 < teacher[name].norm() < tensor.norm()
