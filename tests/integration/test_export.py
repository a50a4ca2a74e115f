"""Runs exported as Hugging Face directories: the same logits, positions and answers as the engine's own."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from sample_run import write_recipe, write_sample_data
from unit.model.test_native_encoders import CONFIGS as NATIVE
from unit.model.test_native_encoders import write_directory

from integration.harness import Scenario, run_scenarios
from laver_mcore.convert.decoder import open_run
from laver_mcore.convert.export import export_run
from laver_mcore.convert.probe import probe
from laver_mcore.data.records.sample import Turn
from laver_mcore.data.sequence.batch import collate
from laver_mcore.data.sequence.prompt import encode_prompt
from laver_mcore.generate import generate
from laver_mcore.megatron import parallel
from laver_mcore.train.build import build_image_processor, build_network, build_tokenizer

TOWERS = {
    "siglip": dict(num_attention_heads=2),
    "clip": dict(num_attention_heads=2, projection_dim=16),
    "dinov2": dict(num_attention_heads=2, mlp_ratio=2),
}
CASES = {
    "encoder-free": "",
    "siglip": "--vision siglip --vision-path {directory}/siglip --vision-random-init",
    "clip": "--vision clip --vision-path {directory}/clip --vision-random-init --vision-layer -2",
    "dinov2": "--vision dinov2 --vision-path {directory}/dinov2 --vision-random-init",
    "aimv2": "--vision aimv2 --vision-path {directory}/aimv2 --vision-random-init --seq-length 256",
    "qwen2-vl": "--vision qwen2-vl --vision-path {directory}/qwen2-vl --vision-random-init",
    "qwen2.5-vl": "--vision qwen2.5-vl --vision-path {directory}/qwen2.5-vl --vision-random-init",
    "qwen3": "--family qwen3 --untie-embeddings-and-output-weights True",
    "llama3.1": "--family llama --rope-scaling 8 1 4 16",
    "released": "--no-mixed-attention --no-rope-2d",
    "victor": "--objective victor --pool-size 64 --no-mixed-attention --no-rope-2d",
}
QUESTIONS = (
    ("<image>\nred green", 1),
    ("<image>\n<image>\nblue dark bright", 2),
    ("left right up", 0),
    ("<image>\nwhat <image>\nup", 2),
)


def write_tower(directory: Path, kind: str) -> None:
    size = dict(height=32, width=32)
    directory.mkdir()
    config = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, image_size=32, patch_size=8, **TOWERS[kind]
    )
    model_type = {"siglip": "siglip_vision_model", "clip": "clip_vision_model", "dinov2": "dinov2"}[kind]
    (directory / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    name = {"siglip": "Siglip", "clip": "CLIP", "dinov2": "Bit"}[kind]
    processor = dict(image_processor_type=f"{name}ImageProcessor", size=size, do_resize=True, resample=3)
    processor |= dict(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=True)
    if kind != "siglip":
        processor |= dict(size=dict(shortest_edge=32), crop_size=size, do_center_crop=True)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One short run per case (large steps, so that answers differ from one another), exported."""
    directory = tmp_path_factory.mktemp("export")
    write_sample_data(directory, num_samples=16)
    recipe = write_recipe(directory)
    for kind in TOWERS:
        write_tower(directory / kind, kind)
    for kind in NATIVE:
        write_directory(directory / kind, kind)
    scenarios = [
        Scenario(
            name=f"run-{name}",
            argv=(
                *f"--config {recipe} --train-iters 4 --lr 1e-2".split(),
                *flags.format(directory=directory).split(),
            ),
        )
        for name, flags in CASES.items()
    ]
    run_scenarios(1, directory, scenarios)
    for name in CASES:
        export_run(directory / f"run-{name}", directory / f"hf-{name}")
    export_run(directory / "run-encoder-free", directory / "hf-teacher", teacher=True)
    return directory


def load(path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True)


def network_of(directory, name):
    warnings.filterwarnings("ignore")
    device = parallel.init_distributed()
    config, _ = open_run(directory / f"run-{name}")
    topology = parallel.build_topology(config.parallel, device)
    return build_network(config, topology, build_tokenizer(config).vocab_size, directory / f"run-{name}")


def images_of(directory, count):
    sizes = ((40, 40), (24, 56))  # native towers make other grids of them
    paths = sorted(directory.glob("*.png"))[:count]
    return [Image.open(path).convert("RGB").resize(size) for path, size in zip(paths, sizes, strict=False)]


def messages_of(text):
    """The question as chat content: the template writes the line break behind an image."""
    parts = []
    for index, piece in enumerate(text.split("<image>")):
        parts += [{"type": "image"}] if index else []
        piece = piece.removeprefix("\n") if index else piece
        parts += [{"type": "text", "text": piece}] if piece else []
    return [{"role": "user", "content": parts}]


def assert_answers_as_the_engine(directory, name, model, processor, pixel_tolerance=0.0):
    """An exported run gives the engine's tokens, pixels, logits and greedy answers for every question."""
    network = network_of(directory, name)
    tokenizer, image_processor = build_tokenizer(network.config), build_image_processor(network.config)
    for text, count in QUESTIONS:
        images = images_of(directory, count)
        grids = [image_processor.grid(*image.size) for image in images]
        prompt = encode_prompt([Turn("user", text)], grids, tokenizer, system_prompt="")
        written = processor.apply_chat_template(messages_of(text), add_generation_prompt=True)
        inputs = processor(text=written, images=images or None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt.token_ids_L.tolist()
        pixels = image_processor(images)
        if count:
            torch.testing.assert_close(inputs["pixel_values"], pixels, atol=pixel_tolerance, rtol=0)
        batch = collate([prompt], ["q"], total_length=len(prompt), pad_id=0, pixels=pixels)
        wanted = probe(
            network.chunks, batch, network.geometry, network.topology, network.vocab_size
        ).logits_TV
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        assert wanted.abs().max() > 0.5
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
        (answer,) = generate(network, [prompt], images, image_processor, stop_token=-1, max_new_tokens=8)
        generated = model.generate(**inputs, max_new_tokens=8, eos_token_id=None, do_sample=False)
        assert generated[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("name", CASES)
def test_tokens_pixels_logits_and_answers_equal_the_engine(directory, name):
    assert_answers_as_the_engine(directory, name, *load(directory / f"hf-{name}"))


@pytest.mark.parametrize("name", ["encoder-free", "siglip", "qwen2.5-vl"])
def test_padded_batches_and_beams_answer_like_single_prompts(directory, name):
    model, processor = load(directory / f"hf-{name}")
    texts, images, single = [], [], []
    for text, count in QUESTIONS:
        texts.append(processor.apply_chat_template(messages_of(text), add_generation_prompt=True))
        images.append(images_of(directory, count))
        inputs = processor(text=texts[-1], images=images[-1] or None)
        out = model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
        single.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        beams = [
            model.generate(**inputs, max_new_tokens=4, num_beams=3, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*beams)
    inputs = processor(text=texts, images=images, padding=True)
    assert inputs["attention_mask"].min() == 0
    out = model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == single


def test_image_tokens_see_later_ones_and_the_mask_is_not_dropped(directory):
    model, processor = load(directory / "hf-encoder-free")
    text = processor.apply_chat_template(messages_of(QUESTIONS[1][0]), add_generation_prompt=True)
    inputs = processor(text=text, images=images_of(directory, 2))
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][15] += 1.0  # the last patch of the first image
    with torch.no_grad():
        first, second = model(**inputs).logits[0], model(**changed).logits[0]
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    moved = (first - second).abs().amax(-1) > 1e-6
    assert not moved[: places[0]].any()
    assert moved[places[:16]].all()


def test_teacher_is_another_model_with_the_same_visual_path(directory):
    student, _ = load(directory / "hf-encoder-free")
    teacher, _ = load(directory / "hf-teacher")
    different = {
        name.split(".")[0]
        for (name, a), (_, b) in zip(student.named_parameters(), teacher.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert different == {"model"}


def test_an_image_behind_a_cache_is_refused(directory):
    """A conversation that goes on with another picture: its tokens are new, its pixels would be passed over."""
    model, processor = load(directory / "hf-encoder-free")
    first, second = images_of(directory, 2)
    text = processor.apply_chat_template(messages_of("<image>\nred"), add_generation_prompt=True)
    out = model.generate(
        **processor(text=text, images=[first]),
        max_new_tokens=2,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    more = processor(text=text + text, images=[first, second])
    with pytest.raises(
        ValueError, match=r"an image begins behind the .* tokens of the cache.*without past_key_values"
    ):
        model.generate(**more, past_key_values=out.past_key_values, max_new_tokens=2)


@pytest.mark.parametrize(
    "how",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}],
    ids=lambda how: next(iter(how)),
)
def test_ways_to_generate_agree(directory, how):
    """Greedy tokens with a growing cache, against a cache of full size, tokens proposed by the prompt, and no cache."""
    model, processor = load(directory / "hf-encoder-free")
    text = processor.apply_chat_template(messages_of("<image>\nred"), add_generation_prompt=True)
    batch = 1 if "prompt_lookup_num_tokens" in how else 2  # it knows batches of one alone
    texts = [text, text + "blue"][:batch]
    inputs = processor(text=texts, images=images_of(directory, batch), padding=True)
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    wanted = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, **how), wanted)
