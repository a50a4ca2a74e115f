"""Vicuna's vocabulary grows by the tokens for vision, the same way from a directory and from a converted checkpoint."""

import pytest
import torch
from sample_decoders import random_decoder
from sample_run import write_recipe, write_sample_data
from sample_tokenizers import write_tokenizer_of
from transformers import AutoTokenizer

from integration.harness import Scenario, read_checkpoint, read_metrics, run_scenarios
from laver_mcore.convert.decoder import import_decoder

TABLES = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One run from each of the two, under TP 2 and under PP 2."""
    directory = tmp_path_factory.mktemp("added")
    write_sample_data(directory, num_samples=12)
    recipe = write_recipe(directory)
    for name in ("vicuna", "llama3.2_tied"):
        folder = write_tokenizer_of(directory / name, "vicuna")
        own = len(AutoTokenizer.from_pretrained(folder))
        random_decoder(name, vocab_size=own).save_pretrained(folder)
        import_decoder(folder, directory / f"{name}-imported")
    scenarios = []
    for name in ("vicuna", "llama3.2_tied"):
        for layout in ("tensor", "pipeline"):
            argv = (
                f"--config {recipe} --{layout}-model-parallel-size 2 --train-iters 1 --lr 0 --seq-length 512"
            )
            argv += f" --tokenizer-model {directory / name} --make-vocab-size-divisible-by 16"
            shape = "--num-layers None --hidden-size None --ffn-hidden-size None"
            given = "--num-layers 2 --ffn-hidden-size 96 --hidden-size {} --num-attention-heads {} "
            given += "--num-query-groups {}"
            heads, groups = (4, 4) if name == "vicuna" else (8, 2)
            own = read_vocabulary(directory / name)
            given = (
                given.format(8 * heads, heads, groups)
                + f" --family llama --vocab-size {own} --rotary-base 1e4"
            )
            given += " --norm-epsilon 1e-5"
            given += (
                " --untie-embeddings-and-output-weights True"
                if name == "vicuna"
                else " --rope-scaling 8 1 4 16"
            )
            for way, flags in (
                ("hf", f"{shape} --hf-path {directory / name}"),
                ("imported", f"{given} --pretrained-checkpoint {directory / name}-imported"),
            ):
                case = f"{name}-{layout}-{way}"
                scenarios.append(Scenario(name=case, argv=tuple(f"{argv} {flags}".split())))
    run_scenarios(2, directory, scenarios)
    return directory


def read_vocabulary(folder):
    return len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", ["vicuna", "llama3.2_tied"])
def test_rows_are_added_alike(directory, name, layout):
    own = read_vocabulary(directory / name)
    first, second = (f"{name}-{layout}-{way}" for way in ("hf", "imported"))
    a, b = (read_metrics(directory / case)[0] for case in (first, second))
    for key in ("loss", "lm_loss", "grad_norm"):
        assert a[key] == pytest.approx(b[key], rel=1e-6)
    old = read_checkpoint(directory / f"{name}-imported", "language_model.")
    tables = [table for table in TABLES if table in old]
    assert len(tables) == (2 if name == "vicuna" else 1)
    for table in tables:
        for case in (first, second):
            new = read_checkpoint(directory / case, table)[table]
            assert torch.equal(new[:own], old[table])
            for row in new[own : own + 3]:
                torch.testing.assert_close(row, old[table].mean(0), atol=1e-6, rtol=1e-5)
