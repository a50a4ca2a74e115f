"""Numbers that cannot be meant, and recipes that cannot be read, are refused in one line before anything is built."""

import pytest

from laver_mcore.config.errors import ConfigError
from laver_mcore.config.load import parse

BASE = "--data-path x.json --tokenizer-model x.model --model tiny --vocab-size 96 --vision encoder-free"

SENSELESS = """
--lr nan: finite
--lr inf: finite
--lr -1: negative
--min-lr 1: above lr
--min-lr -1: negative
--weight-decay nan: finite
--weight-decay -1: negative
--clip-grad inf: finite
--clip-grad -1: negative
--adam-beta1 1: below 1
--adam-beta1 -0.1: negative
--adam-beta2 nan: finite
--adam-eps 0: positive
--lr-warmup-iters -1: negative
--train-iters 0: at least 1
--train-iters -5: at least 1
--seed -1: negative
--micro-batch-size 0: at least 1
--global-batch-size 0: at least 1
--seq-length 0: at least 1
--seq-length -1: at least 1
--num-workers -1: negative
--decode-threads 0: at least 1
--worker-timeout 0: positive
--worker-timeout nan: finite
--packing-window 0: at least 1
--pad-to-multiple 0: at least 1
--data-weights -1: negative
--data-weights nan: finite
--max-bad-fraction -0.1: negative
--max-bad-fraction nan: finite
--num-layers 0: at least 1
--hidden-size 0: at least 1
--hidden-size -64: at least 1
--ffn-hidden-size 0: at least 1
--num-attention-heads 0: at least 1
--num-query-groups 0: at least 1
--kv-channels 0: at least 1
--vocab-size 0: at least 1
--rotary-base 0: positive
--norm-epsilon 0: positive
--norm-epsilon nan: finite
--init-method-std nan: finite
--image-size 0: at least 1
--patch-size 0: at least 1
--connector-hidden-size 0: at least 1
--tensor-model-parallel-size 0: at least 1
--pipeline-model-parallel-size -1: at least 1
--context-parallel-size 0: at least 1
--save-interval 0: at least 1
--exit-interval 0: at least 1
--log-interval 0: at least 1
--skip-to -1: negative
--keep-last 0: at least 1
--keep-every 0: at least 1
--max-skipped 0: at least 1
--peak-tflops 0: positive
--profile-step-start 0: at least 1
--eval-interval 0: at least 1
--lora-rank -1: negative
--objective laver --mask-ratio nan: finite
--objective laver --mask-ratio 2: between 0 and 1
--objective laver --lambda-laver -1: negative
--objective laver --lambda-gram nan: finite
--objective laver --vision-head-hidden-size 0: at least 1
--objective laver --ema-steps 0: at least 1
--objective victor --pool-size 0: at least 1
--objective victor --lambda-victor -1: negative
--objective viral --target-path x --projector-hidden-size 0: at least 1
"""
CASES = [tuple(line.split(": ")) for line in SENSELESS.strip().splitlines()]


@pytest.mark.parametrize(("flags", "words"), CASES, ids=[flags for flags, _ in CASES])
def test_a_senseless_number_is_one_line(flags, words):
    name = (
        next(word for word in reversed(flags.split()) if word.startswith("--"))
        .removeprefix("--")
        .replace("-", "_")
    )
    with pytest.raises(ConfigError, match=words) as raised:
        parse([*BASE.split(), *flags.split()])
    assert name in str(raised.value) and "\n" not in str(raised.value)


RECIPES = {
    "its_own_base": ("base: recipe.yaml", "is its own base, by way of recipe.yaml"),
    "twice": ("train: {seed: 1}\ntrain: {seed: 2}", "train stands twice"),
    "key_twice": ("train:\n  seed: 1\n  seed: 2", "seed stands twice"),
    "true_as_a_number": (
        "train: {train_iters: true}",
        "train.train_iters=True: wants a value of another kind",
    ),
    "false_as_a_rate": ("optimizer: {lr: false}", "optimizer.lr=False: wants a value of another kind"),
    "base_of_another_kind": ("base: [a, b]", "base=\\['a', 'b'\\] is no path"),
    "no_mapping": ("- a", "must be a mapping of sections, got list"),
    "deep": ("[" * 2000, "recipe"),
    "nan": ("optimizer: {lr: .nan}", "lr=nan must be a finite number"),
}


@pytest.mark.parametrize(("text", "message"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_cannot_be_meant_is_one_line(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        parse(["--config", str(tmp_path / "recipe.yaml"), *BASE.split()])
    assert "\n" not in str(raised.value)


def test_a_circle_of_bases_is_named(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml is its own base, by way of a.yaml and b.yaml and c.yaml"):
        parse(["--config", str(tmp_path / "a.yaml"), *BASE.split()])


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(["--config", str(tmp_path), *BASE.split()])
