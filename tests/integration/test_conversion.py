"""HF weights through training runs under TP 2 x PP 2: the same bits come out, whichever way they came in."""

import pytest
import torch
from safetensors.torch import load_file
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, python, run_scenarios
from laver_mcore.config.presets import PRESETS
from laver_mcore.convert.decoder import export_decoder, import_decoder

SHAPES = [name for name in PRESETS if name.startswith("qwen2.5")]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAYS = ("checkpoint", "hf_path")
VOCABULARY = 120  # padded to 128 rows in one process, to 256 under TP 2


def write_model(path, preset, dtype):
    """A random Qwen2 with the preset's head ratio (scaled to divide by 2) and tying."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads, groups = PRESETS[preset]["num_attention_heads"], PRESETS[preset]["num_query_groups"]
    config = Qwen2Config(
        num_hidden_layers=2,
        hidden_size=4 * heads,
        intermediate_size=24,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=VOCABULARY,
        tie_word_embeddings=not PRESETS[preset]["untie_embeddings_and_output_weights"],
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every shape, dtype and way in: one step at learning rate 0 under TP 2 x PP 2, saved."""
    directory = tmp_path_factory.mktemp("conversion")
    write_sample_data(directory / "data", num_samples=8)
    recipe = write_recipe(directory / "data")
    scenarios = []
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            case = f"{shape}-{name}"
            write_model(directory / f"{case}-hf", shape, dtype)
            import_decoder(directory / f"{case}-hf", directory / f"{case}-imported")
            for way in WAYS:
                argv = ["--config", str(recipe), "--tensor-model-parallel-size", "2"]
                argv += ["--pipeline-model-parallel-size", "2", "--train-iters", "1", "--lr", "0"]
                argv += shape_flags(shape)
                if way == "hf_path":
                    argv += ["--hf-path", str(directory / f"{case}-hf")]
                else:
                    argv += ["--pretrained-checkpoint", str(directory / f"{case}-imported")]
                argv += ["--bf16"] if name == "bf16" else []
                scenarios.append(Scenario(name=f"{case}-{way}", argv=tuple(argv)))
    run_scenarios(4, directory, scenarios)
    return directory


def shape_flags(preset):
    heads, groups = PRESETS[preset]["num_attention_heads"], PRESETS[preset]["num_query_groups"]
    tied = not PRESETS[preset]["untie_embeddings_and_output_weights"]
    numbers = {
        "num_layers": 2,
        "hidden_size": 4 * heads,
        "ffn_hidden_size": 24,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "vocab_size": VOCABULARY,
    }
    flags = [
        part for name, number in numbers.items() for part in (f"--{name.replace('_', '-')}", str(number))
    ]
    return [*flags, "--untie-embeddings-and-output-weights", str(not tied)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_through_tp2_pp2(runs, tmp_path, shape, dtype, way):
    wanted = load_file(runs / f"{shape}-{dtype}-hf" / "model.safetensors")
    export_decoder(runs / f"{shape}-{dtype}-{way}", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == DTYPES[dtype]
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_teacher_starts_as_the_student_and_is_exported_in_fp32(runs, tmp_path):
    wanted = load_file(runs / "qwen2.5-7b-bf16-hf" / "model.safetensors")
    export_decoder(runs / "qwen2.5-7b-bf16-hf_path", tmp_path / "teacher", teacher=True)
    found = load_file(tmp_path / "teacher" / "model.safetensors")
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float()), name


def test_bad_directory_stops_a_run_in_one_line(runs, tmp_path):
    command = ["pretrain_laver.py", "--config", str(runs / "data" / "recipe.yaml")]
    command += ["--hf-path", str(tmp_path), "--save", str(tmp_path / "run")]
    done = python(*command, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain_laver.py: error: ")
    assert (
        "config.json: no such file; give a Hugging Face directory of qwen2 or llama or qwen3" in done.stderr
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
