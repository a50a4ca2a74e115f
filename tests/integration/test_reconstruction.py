"""What a run makes of masked tokens: nothing is seen through the mask, and the teacher's own weights judge."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sample_run import write_recipe, write_sample_data

from integration.harness import Scenario, run_scenarios
from laver_mcore.cli.diagnose import reconstruct
from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import from_recipe, resolve
from laver_mcore.config.schema import ParallelConfig
from laver_mcore.convert.decoder import open_run
from laver_mcore.data.records.sample import Turn
from laver_mcore.diagnose.reading import cells, from_cells
from laver_mcore.diagnose.reconstruction import Reconstruction, last_masks, latents, nearest
from laver_mcore.megatron import parallel
from laver_mcore.train.build import build_image_processor, build_network, build_tokenizer, resolve_vocab_size
from laver_mcore.train.saved_weights import load_teacher
from laver_mcore.validation.answers import Reader


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reconstruction")
    write_sample_data(directory, num_samples=16)
    argv = f"--config {write_recipe(directory)} --train-iters 4 --lr 1e-2 --mask-ratio 0.5 --momentum 0.5"
    runs = [Scenario(name="run", argv=tuple(argv.split()))]
    runs.append(Scenario(name="lm", argv=(*argv.split()[:-4], "--objective", "lm")))
    run_scenarios(1, directory, runs)
    return directory


@pytest.fixture(scope="module")
def network(directory):
    config = resolve(replace(from_recipe(directory / "run" / "config.yaml"), parallel=ParallelConfig()))
    topology = parallel.build_topology(config.parallel, parallel.init_distributed())
    yield build_network(
        config, topology, resolve_vocab_size(config, build_tokenizer(config)), directory / "run"
    )
    parallel.forget_groups()


def pictures(network, count=3):
    processor = build_image_processor(network.config)
    grid = processor.grid(32, 32)
    pixels = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    return (
        [Image.fromarray(each) for each in pixels],
        grid,
        Reader(tokenizer=build_tokenizer(network.config), processor=processor),
    )


def batch_of(images, reader):
    asked, keys = [Turn("user", "<image>")] * len(images), [str(n) for n in range(len(images))]
    return reader.batch(asked, images, keys=keys, system_prompt="")


def test_nothing_is_seen_through_the_mask(network):
    images, grid, reader = pictures(network)
    batch = batch_of(images, reader)
    masked_N = last_masks(network, batch)
    assert 0 < masked_N.sum() < len(masked_N)
    student = latents(network, batch, masked_N)
    cut = np.concatenate([cells(image, grid) for image in images])
    cut[masked_N] = 255 - cut[masked_N]
    changed = [from_cells(each, grid) for each in np.split(cut, len(images))]
    other = batch_of(changed, reader)
    torch.testing.assert_close(latents(network, other, masked_N), student, rtol=0, atol=0)
    everything = np.zeros_like(masked_N)
    assert not torch.equal(latents(network, other, everything), latents(network, batch, everything))


def test_the_teacher_is_the_checkpoints(directory, network):
    """Against the checkpoint as the exporter reads it; encoder and connector are shared."""
    _, stored = open_run(directory / "run")
    (chunk,) = network.chunks
    before = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    load_teacher(network.chunks, network.config, network.vocab_size, directory / "run")
    moved = {name for name, p in chunk.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith(("language_model.", "vision_head.")) for name in moved)
    compared = [name for name in moved if f"teacher.{name}" in stored]
    assert any(name.startswith("vision_head.") for name in compared)
    for name in compared:
        torch.testing.assert_close(chunk.get_parameter(name), stored.read(f"teacher.{name}"), rtol=0, atol=0)
    layers = chunk.decoder.layers
    whole = stored.read("teacher.language_model.decoder.layers.self_attention.linear_proj.weight")
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer.self_attention.linear_proj.weight, whole[index], rtol=0, atol=0)


def test_a_run_without_a_teacher_is_one_line(directory):
    with pytest.raises(ConfigError, match="has no teacher: its objective is lm"):
        reconstruct(str(directory / "lm"), [])


def test_nearest_is_the_largest_cosine():
    draw = np.random.default_rng(2)
    student, teacher = draw.normal(size=(5, 8)), draw.normal(size=(7, 8))
    teacher *= draw.uniform(0.1, 10, size=(7, 1))
    cosines = [[s @ t / np.sqrt((s @ s) * (t @ t)) for t in teacher] for s in student]
    assert nearest(torch.tensor(student), torch.tensor(teacher)).tolist() == np.argmax(cosines, 1).tolist()


def test_pictures_show_what_was_masked_and_what_it_was_taken_for():
    """Two pictures of 1 x 2 tokens; the second token of the first is taken for the first of the second."""
    images = [Image.fromarray(np.repeat(np.uint8([[[v] * 3, [v + 1] * 3]]), 4, 1)) for v in (10, 20)]
    found = Reconstruction(
        images=images,
        grids=((1, 2), (1, 2)),
        masked_N=np.array([False, True, True, False]),
        nearest_N=np.array([0, 2, 2, 0]),
    )
    shades = [[np.asarray(each)[0, ::4, 0].tolist() for each in three] for three in found.pictures()]
    assert shades == [[[10, 11], [10, 128], [10, 20]], [[20, 21], [128, 21], [20, 21]]]
    assert found.found == 0.5
    assert found.sentence.startswith("Of 2 masked tokens of 2 held-out pictures, 50.0% ")
