"""The exported demo model reads 50 held-out pages with the engine's own tokens (both may err)."""

import json

import pytest
from PIL import Image

from integration.harness import REPOSITORY, Scenario, run_scenarios
from integration.test_export import load, network_of
from laver_mcore.convert.export import export_run
from laver_mcore.data.records.sample import Turn
from laver_mcore.data.sequence.prompt import encode_prompt
from laver_mcore.generate import generate
from laver_mcore.train.build import build_image_processor, build_tokenizer
from tools.prepare_demo import prepare

NUM_PAGES = 50


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    prepare(directory / "data", num_pages=400, num_heldout=NUM_PAGES)
    data = directory / "data"
    argv = f"--config {REPOSITORY}/examples/demo/stage1.yaml --data-path {data}/align.json"
    argv += f" --tokenizer-model {data}/tokenizer.model --train-iters 150"
    run_scenarios(1, directory, [Scenario(name="run-demo", argv=tuple(argv.split()))])
    export_run(directory / "run-demo", directory / "hf")
    return directory


def test_answers_on_held_out_pages_equal_the_engines(demo):
    network = network_of(demo, "demo")
    model, processor = load(demo / "hf")
    tokenizer, image_processor = build_tokenizer(network.config), build_image_processor(network.config)
    pages = json.loads((demo / "data" / "heldout.json").read_text())
    assert len(pages) == NUM_PAGES
    prompts, images, found = [], [], []
    for page in pages:
        question = "<image>\nRead the page."  # what stage 1 trains
        image = Image.open(demo / "data" / page["image"]).convert("RGB")
        grid = image_processor.grid(*image.size)
        prompts.append(encode_prompt([Turn("user", question)], [grid], tokenizer, system_prompt=""))
        images.append(image)
        text = question.replace("<image>\n", "")
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        written = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        inputs = processor(text=written, images=[image])
        assert inputs["input_ids"][0].tolist() == prompts[-1].token_ids_L.tolist()
        new = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
        found.append(
            new[: new.index(tokenizer.special.end_of_turn)] if tokenizer.special.end_of_turn in new else new
        )
    stop = tokenizer.special.end_of_turn
    wanted = generate(network, prompts, images, image_processor, stop_token=stop, max_new_tokens=12)
    assert found == wanted
    assert len({tuple(answer) for answer in wanted}) > 5
