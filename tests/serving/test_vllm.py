"""Exported runs in a real server: vLLM gives the engine's greedy answers, for text and for images."""

import os
from pathlib import Path

import pytest
from integration.harness import Scenario, run_scenarios
from integration.test_export import QUESTIONS, images_of, messages_of, network_of, write_tower
from sample_run import write_recipe, write_sample_data
from serving.server import as_openai, prepare, serving

from laver_mcore.convert.export import export_run
from laver_mcore.data.records.sample import Turn
from laver_mcore.data.sequence.prompt import encode_prompt
from laver_mcore.generate import generate
from laver_mcore.train.build import build_image_processor, build_tokenizer

ENVIRONMENT = Path(os.environ["LAVER_VLLM"])
# vLLM's kernels know heads of 32 and more, and a CLIP tower.
FLAGS = (
    "--train-iters 6 --lr 1e-2 --objective lm --no-mixed-attention --no-rope-2d --init-method-std 0.2 "
    "--vision clip --vision-path {directory}/clip --vision-random-init --vision-layer -2 "
    "--num-attention-heads 2 --num-query-groups 1 --kv-channels 32 "
    "--trainable vision_encoder.* connector.* language_model.*"
)
GREEDY = dict(max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("serving")
    write_sample_data(directory, num_samples=16)
    recipe = write_recipe(directory)
    write_tower(directory / "clip", "clip")
    argv = f"--config {recipe} {FLAGS.format(directory=directory)}".split()
    run_scenarios(1, directory, [Scenario(name="run-clip", argv=tuple(argv))])
    export_run(directory / "run-clip", directory / "llava", form="llava")
    export_run(directory / "run-clip", directory / "text", decoder_only=True)
    prepare(ENVIRONMENT)
    return directory


@pytest.fixture(scope="module")
def answers(directory):
    """(prompt, answer) of the engine for every question."""
    network = network_of(directory, "clip")
    tokenizer, processor = build_tokenizer(network.config), build_image_processor(network.config)
    found = []
    for text, count in QUESTIONS:
        images = images_of(directory, count)
        grids = [processor.grid(*image.size) for image in images]
        prompt = encode_prompt([Turn("user", text)], grids, tokenizer, system_prompt="")
        (answer,) = generate(network, [prompt], images, processor, stop_token=-1, max_new_tokens=8)
        found.append((prompt.token_ids_L.tolist(), answer))
    assert len({tuple(answer) for _, answer in found}) > 1  # what they say depends on what they are asked
    return found


def test_the_llava_form_answers_about_images(directory, answers):
    with serving(ENVIRONMENT, directory / "llava", directory / "llava.log") as server:
        for (text, count), (prompt, wanted) in zip(QUESTIONS, answers, strict=True):
            parts = as_openai(messages_of(text)[0]["content"], images_of(directory, count))
            body = {"messages": [{"role": "user", "content": parts}], **GREEDY}
            said = server.post("chat/completions", body)
            assert said["prompt_token_ids"] == prompt
            assert said["choices"][0]["token_ids"] == wanted


def test_the_decoder_answers_about_text(directory, answers):
    with serving(ENVIRONMENT, directory / "text", directory / "text.log") as server:
        for (_, count), (prompt, wanted) in zip(QUESTIONS, answers, strict=True):
            if count == 0:
                said = server.post("completions", {"prompt": prompt, **GREEDY})
                assert said["choices"][0]["token_ids"] == wanted
