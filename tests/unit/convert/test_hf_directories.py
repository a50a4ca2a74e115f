"""HF directory -> distributed checkpoint -> HF directory, and every kind of directory that is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_decoders import FAMILIES, random_decoder

from laver_mcore.convert.decoder import export_decoder, import_decoder
from laver_mcore.convert.distributed_checkpoint import row_blocks
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.safetensors_directory import TensorToWrite, open_weights, write_safetensors
from laver_mcore.megatron.checkpoints import CheckpointError

ROOT = Path(__file__).parents[3]


def write_model(path, name="qwen2", dtype=torch.float32, max_shard_size="5GB"):
    """A random model of two narrow layers, in a directory; returns its tensors."""
    model = random_decoder(name, vocab_size=51).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def read_model(path):
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_exact(tmp_path, name, dtype):
    wanted = write_model(tmp_path / "hf", name, dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    import_decoder(tmp_path / "hf", tmp_path / "mcore")
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    assert_same_bits(read_model(tmp_path / "back"), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_directory_loads_in_transformers(tmp_path, name):
    from transformers import AutoModelForCausalLM

    wanted = write_model(tmp_path / "hf", name)
    import_decoder(tmp_path / "hf", tmp_path / "mcore")
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    tokens = torch.arange(10)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "back")]
    assert_same_bits(dict(models[1].named_parameters()), wanted)
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_dtype_casts(tmp_path):
    wanted = write_model(tmp_path / "hf")
    import_decoder(tmp_path / "hf", tmp_path / "mcore", dtype=torch.bfloat16)
    export_decoder(tmp_path / "mcore", tmp_path / "back", dtype=torch.float32)
    found = read_model(tmp_path / "back")
    assert_same_bits(found, {name: tensor.bfloat16().float() for name, tensor in wanted.items()})


def test_row_blocks_cover_everything():
    assert row_blocks((10, 4), torch.float32, limit=48) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert row_blocks((2, 100), torch.float32, limit=1) == [(0, 1), (1, 2)]


def test_vocabulary_in_several_blocks(tmp_path, monkeypatch):
    wanted = write_model(tmp_path / "hf")
    small = lambda shape, dtype: row_blocks(shape, dtype, limit=4000)  # noqa: E731
    monkeypatch.setattr("laver_mcore.convert.decoder.row_blocks", small)
    import_decoder(tmp_path / "hf", tmp_path / "mcore")
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    assert_same_bits(read_model(tmp_path / "back"), wanted)


def test_large_models_are_written_in_shards(tmp_path):
    tensors = {f"t{i}": torch.randn(3, 5) for i in range(4)}
    plan = [
        TensorToWrite(name=n, shape=(3, 5), dtype=t.dtype, blocks=lambda t=t: iter([t[:1], t[1:]]))
        for n, t in tensors.items()
    ]
    write_safetensors(tmp_path, plan, max_shard_bytes=130)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    opened = open_weights(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(opened[name], tensor)
        assert torch.equal(opened.rows(name, 1, 3), tensor[1:])


# Ways to spoil a directory -> what the one line says.


def no_directory(path):
    return path / "nowhere"


def missing_shard(path):
    sorted(path.glob("*.safetensors"))[1].unlink()
    return path


def truncated(path):
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return path


def not_safetensors(path):
    sorted(path.glob("*.safetensors"))[0].write_bytes(b"<html>not found</html>")
    return path


def no_weights(path):
    for file in path.glob("*.safetensors*"):
        file.unlink()
    return path


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def wrong_shape(path):
    return edit_config(path, intermediate_size=32)


def fewer_layers(path):
    return edit_config(path, num_hidden_layers=1)


def more_layers(path):
    return edit_config(path, num_hidden_layers=3)


def unknown_architecture(path):
    return edit_config(path, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"])


def another_family(path):
    return edit_config(path, model_type="llama", architectures=["LlamaForCausalLM"])


def scaled_rope(path):
    return edit_config(path, rope_scaling={"type": "yarn", "factor": 4.0})


def llama_rope(path):
    return edit_config(path, rope_scaling={"rope_type": "llama3", "factor": 8.0})


def sliding_window(path):
    return edit_config(path, use_sliding_window=True, sliding_window=4096)


def mistral_window(path):
    config = json.loads((path / "config.json").read_text())
    del config["use_sliding_window"], config["layer_types"]
    (path / "config.json").write_text(json.dumps(config))
    return edit_config(path, model_type="mistral", sliding_window=4096)


def window_in_some_layers(path):
    return edit_config(path, layer_types=["full_attention", "sliding_attention"])


def mixture_of_experts(path):
    return edit_config(path, model_type="qwen3_moe", num_experts=128)


def experts_of_mixtral(path):
    return edit_config(path, model_type="mixtral", num_local_experts=8)


def quantised(path):
    return edit_config(path, quantization_config={"quant_method": "awq", "bits": 4})


def biased_attention(path):
    return edit_config(path, model_type="qwen3", attention_bias=True)


def broken_json(path):
    (path / "config.json").write_text("{")
    return path


def pickled(path):
    torch.save(read_model(path), path / "pytorch_model.bin")
    return no_weights(path)


BAD = {
    no_directory: "config.json: no such file; give a Hugging Face directory of qwen2 or llama or qwen3",
    missing_shard: "is missing, one of the",
    truncated: "truncated or not a safetensors file",
    not_safetensors: "truncated or not a safetensors file",
    no_weights: "has no model.safetensors and no model.safetensors.index.json",
    wrong_shape: r"mlp.gate_proj.weight is \[96, 112\], its config.json asks for \[32, 112\]",
    fewer_layers: "model.layers.1.* has no place in a qwen2 decoder",
    more_layers: "has no model.layers.2.",
    unknown_architecture: "model_type='gemma3_text' is no decoder known here, only 'qwen2', 'llama', 'qwen3'",
    another_family: "_proj.bias has no place in a llama decoder",
    scaled_rope: "rope_type='yarn' is not supported",
    llama_rope: r"rope_type='llama3' is not supported \(model_type='qwen2'\)",
    sliding_window: r"sliding-window attention \(sliding_window=4096\) is not supported \(model_type='qwen2'\)",
    mistral_window: r"sliding-window attention \(sliding_window=4096\) is not supported \(model_type='mistral'\)",
    window_in_some_layers: "attention of type sliding_attention is not supported",
    mixture_of_experts: r"a mixture of experts \(num_experts=128\) is not supported \(model_type='qwen3_moe'\)",
    experts_of_mixtral: r"a mixture of experts \(num_local_experts=8\) is not supported \(model_type='mixtral'\)",
    quantised: r"a quantised model \(quantization_config\) is not supported",
    biased_attention: r"attention_bias=True is not supported \(model_type='qwen3'\)",
    broken_json: "broken JSON",
    pickled: "has pickled weights only; use a directory with safetensors, or --allow-pickle",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_directory_is_refused_and_nothing_written(tmp_path, spoil):
    write_model(tmp_path / "hf", max_shard_size="20KB")
    path = spoil(tmp_path / "hf")
    with pytest.raises(ValueError, match=BAD[spoil]) as error:
        import_decoder(path, tmp_path / "mcore")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("mcore*"))


def test_pickled_weights_on_demand(tmp_path):
    wanted = write_model(tmp_path / "hf")
    pickled(tmp_path / "hf")
    import_decoder(tmp_path / "hf", tmp_path / "mcore", allow_pickle=True)
    export_decoder(tmp_path / "mcore", tmp_path / "back")
    assert_same_bits(read_model(tmp_path / "back"), wanted)


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickled_code_is_never_executed(tmp_path, capsys):
    write_model(tmp_path / "hf")
    no_weights(tmp_path / "hf")
    torch.save({"a": Hostile()}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="not a readable weights file"):
        import_decoder(tmp_path / "hf", tmp_path / "mcore", allow_pickle=True)
    assert "executed" not in capsys.readouterr().out


def test_existing_folder_is_kept(tmp_path):
    write_model(tmp_path / "hf")
    (tmp_path / "mcore").mkdir()
    (tmp_path / "mcore" / "precious").write_text("")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        import_decoder(tmp_path / "hf", tmp_path / "mcore")
    assert [p.name for p in (tmp_path / "mcore").iterdir()] == ["precious"]


def test_damaged_checkpoint_is_refused(tmp_path):
    write_model(tmp_path / "hf")
    import_decoder(tmp_path / "hf", tmp_path / "mcore")
    for file in (tmp_path / "mcore" / "iter_0000000").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"iter_0000000 is damaged .*has 1,000 bytes"):
        export_decoder(tmp_path / "mcore", tmp_path / "back")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_decoder(tmp_path / "hf", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_extra_tensor_of_another_architecture(tmp_path):
    wanted = write_model(tmp_path / "hf")
    wanted["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    save_file(wanted, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"q_norm\.weight has no place"):
        import_decoder(tmp_path / "hf", tmp_path / "mcore")


def test_command_line(tmp_path):
    wanted = write_model(tmp_path / "hf")

    def run(tool, *argv):
        command = [sys.executable, str(ROOT / "tools" / tool), *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    there = run("hf_to_mcore.py", "--hf-path", tmp_path / "hf", "--save", tmp_path / "mcore")
    assert there.returncode == 0, there.stderr
    back = run("mcore_to_hf.py", "--load", tmp_path / "mcore", "--save", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert_same_bits(read_model(tmp_path / "back"), wanted)
    refused = run("hf_to_mcore.py", "--hf-path", tmp_path, "--save", tmp_path / "again")
    assert refused.returncode == 2
    assert refused.stderr.startswith("hf_to_mcore.py: error: ")
    assert refused.stderr.count("\n") == 1
