"""Inputs that are no single record: each case of `cases/others.jsonl` has the tests that show what becomes of it.

Where a folder `shared/cases` lies beside the repository, its cases are wanted here too.
"""

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cases"
TESTS = Path(__file__).resolve().parents[2]
FOLDERS = [HERE, TESTS.parents[1] / "shared" / "cases"]

# Beginning of a case's input -> file and words there: a test's name, or its row in a table.
SHOWN = {
    'a JSON file {"data"': ("unit/data/test_file_cases.py", '"list under data"'),
    "a .json file with one pretty": ("unit/data/test_file_cases.py", '"one pretty-printed record"'),
    "a data set named train.PARQUET": ("unit/data/test_file_cases.py", ".PARQUET"),
    "a directory of which every image": ("unit/data/test_file_cases.py", '"every image missing"'),
    "the same recipe after the images": (
        "unit/data/test_file_cases.py",
        "test_images_that_were_moved_away_and_back",
    ),
    "column id of type double": ("unit/data/test_file_cases.py", '"id of type double"'),
    "column images all null": ("unit/data/test_file_cases.py", '"images null beside image"'),
    "FineVision texts": ("unit/data/test_file_cases.py", '"FineVision with a null turn"'),
    "broken.avif": ("unit/data/test_image_cases.py", '"cut AVIF"'),
    "TIFF of 32-bit floats": ("unit/data/test_image_cases.py", '"floats of 0 to 1"'),
    "PNG 16 bit holding 12-bit": ("unit/data/test_image_cases.py", '"12 bits in 16, PNG"'),
    "JPEG with EXIF": ("unit/data/test_backends.py", '"exif.jpg"'),
    "tie_word_embeddings true": (
        "unit/convert/test_weight_cases.py",
        '"another head beside a tied embedding"',
    ),
    "safetensors of dtype F64": ("unit/convert/test_weight_cases.py", '"F64"'),
    "safetensors of dtype I8": ("unit/convert/test_weight_cases.py", "codes without their scales"),
    "a NaN in one tensor": ("unit/convert/test_weight_cases.py", '"NaN"'),
    "Hugging Face -> here": ("unit/convert/test_weight_cases.py", "test_settings_come_back"),
    "config.json with vocab_size": ("unit/convert/test_weight_cases.py", '"vocab_size null"'),
    "tokenizer.json whose model": (
        "unit/data/test_tokenizer_errors.py",
        "test_a_model_type_that_the_library",
    ),
    "a plain Qwen directory": ("integration/test_chat_tool.py", "test_answer_about_two_images"),
    "prompt with <|image_pad|>": ("unit/cli/test_tool_arguments.py", "test_special_tokens_in_a_question"),
    "second image in a later turn": ("integration/test_chat_tool.py", "test_conversation_keeps_its_images"),
    "WORLD_SIZE=2 RANK=0": ("unit/megatron/test_environment.py", "test_a_taken_port"),
    "two runs started together": ("integration/test_survival.py", "test_a_second_run_in_the_same_folder"),
    "--load at iteration 8": ("integration/test_survival.py", "test_a_resume_is_held_to_the_run"),
    "20 damaged images of 200": ("integration/test_data_failures.py", "test_damaged_images_train_to_the_end"),
    "--load A --save B with another": ("integration/test_survival.py", "test_a_resume_is_held_to_the_run"),
    "SigLIP model.safetensors": ("unit/model/test_tower_files.py", '"Git LFS pointer"'),
    "config.json says image_size": ("unit/model/test_tower_files.py", '"another image size"'),
    "config says one layer": ("unit/model/test_tower_files.py", '"fewer layers in the config"'),
    "int8 weights without scale": ("unit/model/test_tower_files.py", '"int8"'),
    "preprocessor_config.json with size": ("unit/data/test_processor_cases.py", '"size null"'),
    "CMYK JPEG without Adobe": ("unit/data/test_image_cases.py", '"cmyk without Adobe marker"'),
    "evaluate: TP 2": ("unit/validation/test_answers_of_runs.py", "test_a_broken_picture_costs_its_own"),
    "a tar file as data_path": ("unit/data/test_other_formats.py", "test_samples_of_tars"),
    "a checkpoint with common.pt missing": ("unit/megatron/test_intact.py", "test_every_damage_is_named"),
}
NOT_SHOWN = {"tokenizer file changed after training", "preprocessor size 64 with a tower"}
"""Beginnings of cases that no test shows yet."""


def cases():
    """The inputs of every folder that is there, once."""
    files = [folder / "others.jsonl" for folder in FOLDERS]
    lines = [
        line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return sorted({json.loads(line)["input"] for line in lines})


@pytest.mark.parametrize("case", cases())
def test_a_case_has_its_test(case):
    (start,) = [start for start in {*SHOWN, *NOT_SHOWN} if case.startswith(start)]
    if start in SHOWN:
        file, words = SHOWN[start]
        assert words in (TESTS / file).read_text(encoding="utf-8")
