"""The page of a step: what it holds, and that mask and grid are drawn where they belong."""

import numpy as np
import pytest
from PIL import Image
from sample_run import write_recipe, write_sample_data

from laver_mcore.cli import inspect_data
from laver_mcore.config.load import parse
from laver_mcore.train.build import build_data, build_tokenizer


@pytest.mark.parametrize("masked", [(0, 5), (1,), (2, 3)], ids=str)
def test_masked_tokens_are_red_and_others_are_not(masked):
    mask = np.isin(np.arange(6), masked)
    picture = np.asarray(
        inspect_data.draw_picture(Image.new("RGB", (60, 40), "blue"), (2, 3), mask, longest=60)
    )
    centres = picture[[10, 10, 10, 30, 30, 30], [10, 30, 50, 10, 30, 50]]
    assert (centres[:, 0] > 100).tolist() == mask.tolist()


class Letters:
    """One character a token; id 0 is the visual token."""

    class special:
        image_pad = 0

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(map(chr, ids))


def test_learned_text_is_marked_and_visual_tokens_are_counted():
    tokens = [*map(ord, "a<"), 0, 0, 0, *map(ord, "bcd")]
    labels = [-100] * 5 + [ord("c"), ord("d"), -100]  # of the next token
    assert inspect_data.document_html(tokens, labels, Letters()) == (
        "a&lt;<b>[3 visual tokens]</b>b<mark>cd</mark>"
    )


def test_the_page_of_a_step_is_what_the_run_sees(tmp_path):
    write_sample_data(tmp_path)
    recipe = write_recipe(tmp_path)
    output = tmp_path / "steps.html"
    argv = ["--config", str(recipe), "--skip-to", "5", "--steps", "2", "--output", str(output)]
    assert inspect_data.main(argv) == 0
    text = output.read_text(encoding="utf-8")
    assert "Step 5 (iteration 6)" in text and "Step 6 (iteration 7)" in text and "Step 7" not in text
    assert text.count("DP 2: ") == text.count("DP 4: ") == 2
    config, _ = parse(["--config", str(recipe)])
    data = build_data(config, build_tokenizer(config))
    sizes = {"global_batch_size": 4, "micro_batch_size": 1}
    for step in (5, 6):
        for batch in data.step_batches(step, **sizes):
            for (key, index), (rows, columns) in zip(batch.image_keys, batch.image_grids, strict=True):
                assert (
                    f"{key}, image {index}: {rows * columns // 2} of {rows * columns} tokens masked" in text
                )
    assert inspect_data.main([*argv[:-1], str(output), "--data-path", "nowhere.json"]) == 1
