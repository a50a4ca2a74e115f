"""Which of a checkpoint's tensors are exported, under which names, in which precision."""

import pytest
import torch

from laver_mcore.config.presets import fill_from_preset
from laver_mcore.config.schema import ModelConfig
from laver_mcore.convert.decoder import decoder_tensors
from laver_mcore.convert.errors import ConversionError
from laver_mcore.convert.export import _visual_tensors

D, F, H, G, C, V, PADDED = 8, 12, 4, 2, 2, 5, 16
LAYERS = "language_model.decoder.layers."
EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"


class Checkpoint(dict):
    """A checkpoint's tensors by key, the layers of one weight stacked; read as `CheckpointReader` reads them."""

    folder = "run"

    def shape(self, key):
        return tuple(self[key].shape)

    def dtype(self, key):
        return self[key].dtype

    def read(self, key, layer=None, rows=None):
        tensor = self[key] if layer is None else self[key][layer]
        return tensor if rows is None else tensor[slice(*rows)]


def stored(seed, dtype):
    """Random decoder of two layers whose vocabulary is padded, as Megatron stores it, norms under the fused names."""
    shapes = {
        EMBEDDING: (PADDED, D),
        HEAD: (PADDED, D),
        "language_model.decoder.final_layernorm.weight": (D,),
        f"{LAYERS}self_attention.linear_qkv.layer_norm_weight": (2, D),
        f"{LAYERS}self_attention.linear_qkv.weight": (2, (H + 2 * G) * C, D),
        f"{LAYERS}self_attention.linear_qkv.bias": (2, (H + 2 * G) * C),
        f"{LAYERS}self_attention.linear_proj.weight": (2, D, H * C),
        f"{LAYERS}mlp.linear_fc1.layer_norm_weight": (2, D),
        f"{LAYERS}mlp.linear_fc1.weight": (2, 2 * F, D),
        f"{LAYERS}mlp.linear_fc2.weight": (2, D, F),
    }
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def by_hand(found, tied):
    """Hugging Face's tensors: queries, key and value are cut out of each group, gate and up out of one matrix."""
    wanted = {"model.embed_tokens.weight": found[EMBEDDING][:V]}
    wanted["model.norm.weight"] = found["language_model.decoder.final_layernorm.weight"]
    if not tied:
        wanted["lm_head.weight"] = found[HEAD][:V]
    per_group = H // G
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            heads = found[f"{LAYERS}self_attention.linear_qkv.{kind}"][layer].split(C)
            groups = [heads[g * (per_group + 2) : (g + 1) * (per_group + 2)] for g in range(G)]
            wanted[f"{prefix}self_attn.q_proj.{kind}"] = torch.cat([h for g in groups for h in g[:per_group]])
            wanted[f"{prefix}self_attn.k_proj.{kind}"] = torch.cat([g[per_group] for g in groups])
            wanted[f"{prefix}self_attn.v_proj.{kind}"] = torch.cat([g[per_group + 1] for g in groups])
        fc1 = found[f"{LAYERS}mlp.linear_fc1.weight"][layer]
        wanted[f"{prefix}mlp.gate_proj.weight"], wanted[f"{prefix}mlp.up_proj.weight"] = fc1[:F], fc1[F:]
        for theirs, ours in {
            "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
            "post_attention_layernorm": "mlp.linear_fc1.layer_norm_weight",
            "self_attn.o_proj": "self_attention.linear_proj.weight",
            "mlp.down_proj": "mlp.linear_fc2.weight",
        }.items():
            wanted[f"{prefix}{theirs}.weight"] = found[LAYERS + ours][layer]
    return wanted


def model(tied):
    return fill_from_preset(
        ModelConfig(
            num_layers=2,
            hidden_size=D,
            ffn_hidden_size=F,
            num_attention_heads=H,
            num_query_groups=G,
            untie_embeddings_and_output_weights=not tied,
        )
    )


@pytest.mark.parametrize("cast", [None, torch.float16], ids=["as_stored", "fp16"])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_decoder(tied, teacher, cast):
    """The teacher's are its fp32 averages; rows of the vocabulary that are no tokens stay behind."""
    student, averages = stored(0, torch.bfloat16), stored(1, torch.float32)
    if tied:
        del student[HEAD], averages[HEAD]
    checkpoint = Checkpoint(student | {f"teacher.{key}": tensor for key, tensor in averages.items()})
    found = decoder_tensors(model(tied), checkpoint, V, teacher=teacher, dtype=cast)
    wanted = by_hand(averages if teacher else student, tied)
    assert {t.name for t in found} == set(wanted)
    for tensor in found:
        read = torch.cat(list(tensor.blocks()))
        assert tensor.shape == tuple(read.shape), tensor.name
        assert tensor.dtype == (cast or (torch.float32 if teacher else torch.bfloat16))
        assert torch.equal(read, wanted[tensor.name]), tensor.name


def test_a_run_without_a_teacher_has_none_to_export():
    with pytest.raises(ConversionError, match="the run had no teacher"):
        decoder_tensors(model(tied=False), Checkpoint(stored(0, torch.float32)), V, teacher=True)


def test_visual_path_keeps_its_names_and_what_serves_training_stays_behind():
    kept = ("connector.layers.0.weight", "vision_encoder.tower.embeddings.patch_embedding.weight")
    others = ("mask_token", "vision_head.layers.0.weight", EMBEDDING, "teacher.vision_head.layers.0.weight")
    tensors = {key: torch.full((2, 3), float(i)) for i, key in enumerate((*kept, *others))}
    found = _visual_tensors(Checkpoint(tensors), torch.bfloat16)
    assert {t.name: (t.dtype, t.shape) for t in found} == dict.fromkeys(kept, (torch.bfloat16, (2, 3)))
    for tensor in found:
        assert torch.equal(torch.cat(list(tensor.blocks())), tensors[tensor.name])
