"""tools/diagnose.py on a run and its teacher: measures against whole attention matrices, the page in a browser."""

import csv
import json

import numpy as np
import pytest
import torch
from browser import needs_browser, opened
from long import LONG
from PIL import Image
from sample_run import write_recipe, write_sample_data
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from integration.harness import Scenario, python, run_scenarios
from laver_mcore.cli.diagnose import load
from laver_mcore.convert.export import export_run
from laver_mcore.diagnose.encoder import Encoder
from laver_mcore.diagnose.page import page
from laver_mcore.diagnose.reading import Question, read, shuffled, table

LAYERS = [
    {"layer": 1.0, "visual_similarity": 0.25, "head_0": 9.0},
    {"layer": 2.0, "visual_similarity": 0.75, "head_0": 10.0},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("diagnose")
    write_sample_data(directory, num_samples=16)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(directory / "dinov2")
    square = dict(height=32, width=32)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(directory / "dinov2")
    argv = f"--config {write_recipe(directory)} --train-iters 4 --lr 1e-2"
    run_scenarios(1, directory, [Scenario(name="run", argv=tuple(argv.split()))])
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    for name in range(3):
        Image.fromarray(np.roll(pixels, 5 * name, 0)).save(directory / f"{name}.png")
    records = [
        {
            "id": str(name),
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nred green"},
                {"from": "gpt", "value": "blue dark"},
            ],
        }
        for name in range(3)
    ]
    (directory / "asked.json").write_text(json.dumps(records))
    return directory


def test_attention_equals_the_whole_matrix(directory):
    export_run(directory / "run", directory / "hf")
    model, processor = load(directory / "hf", True)
    with Image.open(directory / "0.png") as image:
        question = Question(image=image.convert("RGB"), question="red green", answer="blue dark")
    reading = read(model, processor, question)
    parts = [{"type": "image"}, {"type": "text", "text": "red green"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    start = len(processor(text=text, images=[question.image])["input_ids"][0])
    inputs = processor(text=text + "blue dark", images=[question.image])
    model.model.config._attn_implementation = "eager"
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _module, _inputs, out: found.append(out[1]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    assert len(found) == len(reading.share) > 1
    for index, matrix in enumerate(found):
        seen = matrix[0].double()[:, start:][..., visual]
        torch.testing.assert_close(reading.share[index].double(), seen.sum(-1).mean(1), rtol=0, atol=1e-5)
        over = seen / seen.sum(-1, keepdim=True)
        entropy = -(over * over.log()).sum(-1).mean(1) / np.log(int(visual.sum()))
        torch.testing.assert_close(reading.entropy[index].double(), entropy, rtol=0, atol=1e-5)
        torch.testing.assert_close(reading.maps[index].double(), over[:, 0].mean(0), rtol=0, atol=1e-5)
    assert [len(states) for states in reading.visual] == [int(visual.sum())] * len(found)
    assert table([reading])[0]["visual_attention"] == pytest.approx(float(reading.share[0].mean()))


def test_shuffling_moves_whole_tokens():
    places = np.arange(12).reshape(3, 4)
    cells = np.kron(places, np.ones((5, 6), dtype=int)).astype(np.uint8)
    image = Image.fromarray(np.stack([cells] * 3, -1))
    moved = np.asarray(shuffled(image, (3, 4), seed=1))[..., 0].reshape(3, 5, 4, 6)
    assert (moved == moved[:, :1, :, :1]).all()
    assert sorted(moved[:, 0, :, 0].ravel()) == list(range(12))
    assert moved[:, 0, :, 0].ravel().tolist() != list(range(12))


def test_encoder_states_stand_at_their_places(directory):
    """The same grid: the patches' states as they are; one place: their mean."""
    encoder = Encoder(str(directory / "dinov2"))
    with Image.open(directory / "0.png") as image:
        pixels = encoder.processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = encoder.model(pixels).last_hidden_state[0, 1:]
        torch.testing.assert_close(encoder(image, (4, 4)), states)
        torch.testing.assert_close(encoder(image, (1, 1))[0], states.mean(0))


@LONG
def test_command_line(directory):
    argv = f"--model {directory}/run --teacher-of {directory}/run --data {directory}/asked.json"
    argv += f" --encoder {directory}/dinov2"
    done = python("tools/diagnose.py", *argv.split(), "--output", str(directory / "out"))
    assert done.returncode == 0, done.stderr
    found = json.loads((directory / "out" / "diagnosis.json").read_text())
    assert list(found["layers"]) == list(found["accuracy"]) == ["run", "run, teacher"]
    assert set(found["accuracy"]["run"]) == {"as it is", "shuffled", "swapped", "removed"}
    with (directory / "out" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(-1 <= float(row["cknna"]) <= 1 for row in rows)
    assert len(rows) == sum(map(len, found["layers"].values()))
    text = (directory / "out" / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text
    refused = python("tools/diagnose.py", *argv.split(), "--num-questions", "1")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1


@needs_browser
def test_a_browser_sorts_a_table_by_number(tmp_path):
    """A click on head 0 and another: 10 stands before 9."""
    text = page({"one <b>": LAYERS}, {"one <b>": {"as it is": 0.5}}, {})
    clicks = (
        '<script>{const heads = document.querySelectorAll("table")[1].querySelectorAll("th");'
        'heads[2].click(); heads[2].click(); document.title = "sorted"}</script>'
    )
    found = opened(text + clicks, tmp_path)
    assert "<title>sorted</title>" in found
    assert 0 < found.rindex('data-value="10.0"') < found.rindex('data-value="9.0"')
    assert "one &lt;b&gt;, layer 2: 0.75" in found
