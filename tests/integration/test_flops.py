"""FLOPs by formula against torch's own counter on a real step, and the step's counts against its masks."""

import json
from dataclasses import replace

import pytest
from sample_run import write_recipe, write_sample_data
from unit.model.test_native_encoders import CONFIGS, write_directory

from integration.harness import torchrun
from integration.test_methods import write_target
from laver_mcore.accounting.flops import step_flops
from laver_mcore.accounting.work import WORK, StepWork
from laver_mcore.config.load import parse
from laver_mcore.shapes.weights import list_weights

DECODER = "--trainable connector.* language_model.* mask_token vision_head.*"
VIRAL = "--objective viral --target-path {directory}/target --projector-hidden-size 24"
TOWER = "--overlong drop --vision KIND --vision-path {directory}/KIND --vision-random-init"
# Name -> flags. The sample recipe is encoder-free LaVer in which everything trains.
STEPS = {
    "laver": "",
    "lm_only": "--objective lm",
    "connector_alone": "--objective lm --trainable connector.*",
    "upper_layers": "--trainable language_model.decoder.layers.[23].* vision_head.*",
    "one_matrix": "--objective lm --trainable language_model.decoder.layers.2.mlp.linear_fc1.weight",
    "heads_alone": "--trainable vision_head.* language_model.output_layer.weight "
    "--untie-embeddings-and-output-weights True",
    "lora": "--lora-rank 4",
    "lora_targets": "--lora-rank 4 --lora-targets linear_qkv linear_fc2 --objective lm --trainable language_model.*",
    "qwen3": "--family qwen3",
    "untied": "--untie-embeddings-and-output-weights True",
    "full_recompute": "--recompute-granularity full",
    "block_recompute": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "selective_recompute": "--recompute-granularity selective",
    "micro_batch_2": "--micro-batch-size 2",
    "victor": "--objective victor --pool-size 64",
    "viral": f"{VIRAL} --target-layers 2 3",
    "viral_own_projectors": f"{VIRAL} --target-layers 1 4 --no-shared-projector",
    **{f"{kind}_frozen": f"{TOWER} {DECODER}".replace("KIND", kind) for kind in CONFIGS},
    **{f"{kind}_trained": TOWER.replace("KIND", kind) for kind in CONFIGS},
}  # fmt: skip


def argv_of(directory, name):
    gram = "" if "gram" in name or "--objective" in STEPS[name] else "--gram off"
    flags = f"--config {directory}/recipe.yaml {STEPS.get(name, '')} {gram} --kernels reference"
    return flags.format(directory=directory).split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("flops")
    write_sample_data(directory, num_samples=12)
    write_recipe(directory)
    for kind in CONFIGS:
        write_directory(directory / kind, kind)
    write_target(directory / "target")
    plan = [{"name": name, "argv": argv_of(directory, name)} for name in (*STEPS, "with_gram")]
    (directory / "plan.json").write_text(json.dumps(plan))
    done = torchrun(1, "tests/integration/accounting_worker.py", str(directory / "plan.json"))
    assert done.returncode == 0, done.stderr[-6000:]
    return directory


def observed(directory, name):
    config, _ = parse(argv_of(directory, name))
    return config, json.loads((directory / f"{name}.0.json").read_text())


def matrix_flops(found):
    """All products but attention's, which the reference computes over dense masks, and the Gram loss's."""
    return sum(n for op, n in found["flops"].items() if "attention" not in op and op != "bmm")


def trained_matrices(config, found):
    return [w for w in list_weights(config, found["vocab_size"]) if w.trains and w.rows]


@pytest.mark.parametrize("name", STEPS)
def test_matrix_products(directory, name):
    config, found = observed(directory, name)
    work = StepWork.of(found["work"])
    no_pairs = dict.fromkeys(
        ("dialogue_pairs", "reconstruction_pairs", "patch_pairs", "window_pairs", "gram_pairs"), 0
    )
    flops = step_flops(config, found["vocab_size"], replace(work, **no_pairs))
    # On the CPU the reference multiplies with the real vocabulary, not with the padded one.
    expected = flops.total.hardware - flops.lm_head.hardware + flops.lm_head.model
    if name == "one_matrix":  # Megatron's linear layer makes its input's gradient even if nobody asks for it
        rows, (weight,) = work.dialogue_rows + work.student_padding, trained_matrices(config, found)
        expected += 2 * rows * weight.size
    if name.startswith(
        "viral"
    ):  # scores and values of the frozen encoder: 2 layers, 16 patches and CLS, width 32
        expected -= work.images * 2 * 4 * 17**2 * 32
    assert matrix_flops(found) == pytest.approx(expected, rel=1e-9)


def test_gram(directory):
    """The reference multiplies whole squares and differentiates both factors: 8 n^2 K where the kernels need 4."""
    config, found = observed(directory, "with_gram")
    expected = step_flops(config, found["vocab_size"], StepWork.of(found["work"])).gram.model
    assert expected > 0
    assert found["flops"]["bmm"] == pytest.approx(2 * expected)


@pytest.mark.parametrize("name", STEPS)
def test_parameters(directory, name):
    """Every weight of the list is one of the model's, with its size, and none is missing."""
    config, found = observed(directory, name)
    listed = {w.name: (w.size, w.trains) for w in list_weights(config, found["vocab_size"])}
    real = {}
    for parameter, shape, trains, _, _ in found["parameters"]:
        size = 1
        for side in shape:
            size *= side
        real[parameter] = (size, trains)
    assert listed == real


def test_counts(directory):
    _, found = observed(directory, "laver")
    counts = found["counts"] | dict(zip(WORK, found["work"], strict=True))
    assert counts["dialogue_pairs"] == sum(pairs for pairs, _ in found["masks"])
    grids = [grid for _, grids in found["masks"] for grid in grids]
    assert counts["reconstruction_pairs"] == sum((h * w) ** 2 for h, w in grids)
    assert counts["visual_tokens"] == sum(h * w for h, w in grids)
    assert counts["images"] == len(grids)
    assert counts["lm_loss"] == counts["supervised_rows"] > 0
    assert counts["mim_loss"] == counts["masked_rows"] > 0
    assert "gram_loss" not in counts  # the recipe is without a Gram loss here
    assert counts["visual_similarity"] == sum(h * w > 1 for h, w in grids)
