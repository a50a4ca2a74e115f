"""The adapters of `evaluation/` on an exported model, against stand-ins for the frameworks; where lmms-eval is
installed, under lmms-eval itself.
"""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from sample_run import write_recipe, write_sample_data

from integration.harness import REPOSITORY, Scenario, run_scenarios
from laver_mcore.convert.export import export_run

EVAL = REPOSITORY / "examples" / "eval"


class ChatMessages:
    """lmms_eval.protocol.ChatMessages, as its model guide describes it."""

    def __init__(self, messages):
        self.messages = messages

    def extract_media(self):
        images = [part["url"] for m in self.messages for part in m["content"] if part["type"] == "image"]
        return images, [], []

    def to_hf_messages(self):
        def convert(part):
            return {"type": "image", "image": part["url"]} if part["type"] == "image" else part

        return [
            {"role": m["role"], "content": [convert(part) for part in m["content"]]} for m in self.messages
        ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval")
    write_sample_data(directory, num_samples=16)
    recipe = write_recipe(directory)
    argv = ("--config", str(recipe), "--train-iters", "4", "--lr", "1e-2")
    run_scenarios(1, directory, [Scenario(name="run", argv=argv)])
    export_run(directory / "run", directory / "hf")
    return directory


@pytest.fixture
def frameworks(monkeypatch):
    """Stand-ins for the parts of lmms-eval and VLMEvalKit that the adapters import."""
    modules = {
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"__init__": lambda self: None})},
        "lmms_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "vlmeval.vlm.base": {"BaseModel": object},
    }
    for name, content in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        vars(sys.modules[name]).update(content)
    yield
    for name in [name for name in sys.modules if name.startswith("laver_mcore.evaluation")]:
        del sys.modules[name]


@pytest.fixture
def task_utils(monkeypatch, directory):
    monkeypatch.setenv("LAVER_DEMO", str(directory))
    monkeypatch.syspath_prepend(str(EVAL / "tasks" / "laver_demo"))
    module = importlib.import_module("utils")
    yield module
    del sys.modules["utils"]


@pytest.mark.parametrize("leading", [(), ("context",)], ids=["documented", "with context"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lmms_eval_answers_a_local_task(directory, frameworks, task_utils, batch_size, leading):
    adapter = importlib.import_module("laver_mcore.evaluation.lmms_adapter")
    model = adapter.Laver(
        pretrained=str(directory / "hf"), device="cpu", trust_remote_code=True, batch_size=batch_size
    )
    docs = [doc for doc in json.loads((directory / "train.json").read_text()) if "image" in doc]
    model.task_dict = {"laver_demo": {"test": docs}}
    requests = [
        SimpleNamespace(
            args=(
                *leading,
                task_utils.doc_to_messages,
                {"max_new_tokens": 4 + i % 2},
                i,
                "laver_demo",
                "test",
            )
        )
        for i in range(len(docs))
    ]
    assert model.device == torch.device("cpu")  # lmms-eval under several processes asks for it
    answers = model.generate_until(requests)
    assert len(answers) == len(docs)
    single = adapter.Laver(pretrained=str(directory / "hf"), device="cpu", trust_remote_code=True)
    single.task_dict = model.task_dict
    assert [single.generate_until([request])[0] for request in requests] == answers
    for doc, answer in zip(docs, answers, strict=True):
        assert task_utils.process_results(doc, [answer])["exact_match"] in (0.0, 1.0)
    assert task_utils.process_results(docs[0], [task_utils.doc_to_target(docs[0]) + "\n"]) == {
        "exact_match": 1.0
    }


def test_log_likelihood_is_that_of_the_whole_text(directory, frameworks, task_utils):
    adapter = importlib.import_module("laver_mcore.evaluation.lmms_adapter")
    model = adapter.Laver(pretrained=str(directory / "hf"), device="cpu", trust_remote_code=True)
    doc = next(doc for doc in json.loads((directory / "train.json").read_text()) if "image" in doc)
    model.task_dict = {"t": {"test": [doc]}}
    question, page = task_utils.doc_to_text(doc), task_utils.doc_to_visual(doc)
    requests = [
        SimpleNamespace(args=(question, target, task_utils.doc_to_visual, 0, "t", "test"))
        for target in ("few few", lambda doc: "\n")
    ]
    found = model.loglikelihood(requests)
    processor = model.answering.processor
    prompt = processor.apply_chat_template(task_utils.doc_to_messages(doc), add_generation_prompt=True)
    start = processor(text=prompt, images=page)["input_ids"].shape[1]
    for (score, greedy), target in zip(found, ("few few", "\n"), strict=True):
        inputs = processor(text=prompt + target, images=page)
        ids = inputs["input_ids"][0, start:]
        with torch.no_grad():
            logits = model.answering.model(**inputs).logits[0, start - 1 : -1]
        wanted = sum(float(row.log_softmax(-1)[i]) for row, i in zip(logits, ids, strict=True))
        assert score == pytest.approx(wanted, abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == ids).all())


def test_vlmevalkit_answers_interleaved_messages(directory, frameworks, tmp_path):
    adapter = importlib.import_module("laver_mcore.evaluation.vlmevalkit_adapter")
    model = adapter.Laver(str(directory / "hf"), device="cpu", trust_remote_code=True, max_new_tokens=4)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    image = {"type": "image", "value": str(tmp_path / "a.png")}
    message = [image, {"type": "text", "value": "red"}, image, {"type": "text", "value": "green"}]
    assert model.generate_inner(message, dataset="MMStar") == model.generate_inner(message)


def test_unknown_model_argument_is_refused(directory, frameworks):
    adapter = importlib.import_module("laver_mcore.evaluation.lmms_adapter")
    with pytest.raises(ValueError, match="unknown model_args"):
        adapter.Laver(pretrained=str(directory / "hf"), device="cpu", trust_remote_code=True, max_frames=3)


def test_manifest_and_task_name_things_that_exist(frameworks, task_utils):
    adapter = importlib.import_module("laver_mcore.evaluation.lmms_adapter")
    module, name = adapter.model_manifest().chat_class_path.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), name)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((EVAL / "tasks" / "laver_demo" / "laver_demo.yaml").read_text(), Loader)
    functions = [value for value in task.values() if isinstance(value, str) and value.startswith("utils.")]
    assert len(functions) == 5
    assert all(hasattr(task_utils, value.removeprefix("utils.")) for value in functions)
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).name == "heldout.json"


def test_lmms_eval_itself_runs_the_task(directory, tmp_path):
    """`laver eval` under the real framework: the score is what the adapter's answers come to."""
    pytest.importorskip("lmms_eval")
    docs = [doc for doc in json.loads((directory / "train.json").read_text()) if "image" in doc]
    (tmp_path / "data" / "demo").mkdir(parents=True)
    (tmp_path / "data" / "demo" / "heldout.json").write_text(json.dumps(docs))
    environment = os.environ | {"LAVER_DEMO": str(directory), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "laver_mcore",
        "eval",
        "--model",
        str(directory / "hf"),
        "--device",
        "cpu",
    ]
    command += ["--tasks", "laver_demo", "--include-path", str(EVAL / "tasks"), "--batch-size", "3"]
    command += ["--output", "out", "--trust-remote-code"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["laver_demo"]["exact_match"]["value"]
    assert found * len(docs) == pytest.approx(round(found * len(docs)))
    assert done.stdout.splitlines()[1].split()[:3] == ["laver_demo", "exact_match", f"{found:.4f}"]
