"""Command lines that people get wrong: extra arguments, and words of the one line that answers them."""

import importlib.util

# What a recipe or a command line alone gives away: refused before torch is imported.
# Extra arguments -> words of the line. {d} is the folder of the sample data.
COMMAND_LINES: dict[str, tuple[str, str]] = {
    "unknown_flag": (
        "--global-batch-sizes 8",
        "unknown flag --global-batch-sizes; did you mean --global-batch-size?",
    ),
    "misspelt_config": ("--confg recipe.yaml", "unknown flag --confg; did you mean --config?"),
    "unknown_flag_with_value": ("--mask_ration=0.5", "did you mean --mask-ratio?"),
    "wrong_type": ("--train-iters many", "--train-iters: invalid literal for int() with base 10: 'many'"),
    "unknown_choice": (
        "--gram cgaa",
        "invalid choice 'cgaa' for argument '--gram'. Expected one of ('cga', 'ga', 'off')",
    ),
    "missing_value": ("--system-prompt", "Missing value for argument '--system-prompt'"),
    "too_few_values": ("--mrope-section 1 2", "--mrope-section"),
    "stray_word": ("8", "unexpected argument '8'"),
    "indivisible_heads": (
        "--tensor-model-parallel-size 3",
        "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3; use 1 or 2",
    ),
    "indivisible_groups": (
        "--tensor-model-parallel-size 4",
        "num_query_groups=2 is not divisible by tensor_model_parallel_size=4; use 1 or 2",
    ),
    "indivisible_layers": (
        "--pipeline-model-parallel-size 3",
        "num_layers=4 is not divisible by 3 pipeline chunks",
    ),
    "indivisible_chunks": (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
        "num_layers=4 is not divisible by 6 pipeline chunks",
    ),
    "context_parallel_heads": (
        "--context-parallel-size 3",
        "context_parallel_size=3 cannot share 4 query and 2 key/value heads of each tensor-parallel rank evenly; "
        "use 1, 2, 4",
    ),
    "nothing_trains": ("--trainable", "trainable is empty, so nothing would train"),
    "param_gather_alone": (
        "--overlap-param-gather",
        "needs use_distributed_optimizer and overlap_grad_reduce",
    ),
    "sequence_parallel_alone": ("--sequence-parallel", "needs tensor_model_parallel_size > 1"),
    "unknown_preset": ("--model qwen2.5-8b", "'qwen2.5-8b' is no preset; did you mean 'qwen2.5-"),
    "mask_ratio_out_of_range": ("--mask-ratio 1.5", "mask_ratio=1.5 is not between 0 and 1"),
    "tower_without_directory": ("--vision clip", "vision=clip needs vision_path"),
    "two_starting_points": ("--load {d} --pretrained-checkpoint {d}", "give one of them"),
    "missing_recipe": ("--config {d}/nowhere.yaml", "nowhere.yaml does not exist"),
    "hf_path_missing": ("--hf-path {d}/nowhere", "nowhere/config.json: no such file"),
}

# Recipes that are wrong by themselves -> words of the line.
RECIPES: dict[str, tuple[str, str]] = {
    "unknown_key": ("laver: {mask_ration: 0.5}", "unknown key laver.mask_ration; did you mean 'mask_ratio'?"),
    "unknown_section": ("optimiser: {lr: 1.0e-3}", "unknown section 'optimiser'; did you mean 'optimizer'?"),
    "unknown_value": ("laver: {gram: cgaa}", "laver.gram='cgaa': input should be 'cga', 'ga' or 'off'"),
    "wrong_type": ("train: {train_iters: many}", "train.train_iters='many': input should be a valid integer"),
    "section_is_no_mapping": ("train: [1, 2]", "section train must be a mapping, got list"),
    "not_yaml": ("train: {train_iters: 1", "is not valid YAML"),
    "a_list": ("[1, 2]", "must be a mapping of sections, got list"),
    "missing_base": ("base: nowhere.yaml", "nowhere.yaml does not exist"),
}

# What only shows in data, tokenizer, checkpoint or model: refused inside the process group.
RUNS: dict[str, tuple[str, str]] = {
    "world_size": ("--tensor-model-parallel-size 2", "world size 1 is not divisible by"),
    "indivisible_batch": ("--micro-batch-size 3", "global_batch_size=4 is not divisible by"),
    "missing_data": ("--data-path {d}/nowhere.json", "nowhere.json: no such file"),
    "missing_image": ("--data-path {d}/missing_image.json", "gone.png' does not exist"),
    "broken_json": ("--data-path {d}/broken.json", "broken.json:3: broken JSON at column"),
    "broken_jsonl": ("--data-path {d}/broken.jsonl", "broken.jsonl:2: broken JSON at column"),
    "placeholders_disagree": (
        "--data-path {d}/placeholders.json",
        "2 <image> placeholder(s) in the user turns but 1",
    ),
    "too_long": ("--seq-length 32", "tokens, more than seq_length=32; raise seq_length to"),
    "missing_tokenizer": ("--tokenizer-model {d}/nowhere.model", "nowhere.model: no tokenizer"),
    "vocabulary_too_small": ("--vocab-size 32", "the tokenizer has 96 tokens"),
    "wrong_vision_tower": (
        "--vision clip --vision-path {d}/tower",
        "config.json: model_type='llama', wanted",
    ),
    "tower_of_another_kind": (
        "--vision clip --vision-path {d}/siglip --vision-random-init",
        "model_type='siglip_vision_model', wanted 'clip' or 'clip_vision_model'; set vision to 'siglip'",
    ),
    "wrong_native_tower": (
        "--vision qwen2-vl --vision-path {d}/qwen",
        "model_type='llama', wanted 'qwen2_vl'",
    ),
    "native_tower_without_config": (
        "--vision aimv2 --vision-path {d}/headless",
        "headless/config.json: no such file",
    ),
    "missing_vision_tower": (
        "--vision siglip --vision-path {d}/nowhere",
        "no such file; give a Hugging Face directory for vision_path",
    ),
    "trainable_matches_nothing": (
        "--trainable conector.*",
        "trainable pattern 'conector.*' matches no parameter",
    ),
    "load_missing": ("--load {d}/nowhere", "load={d}/nowhere does not exist"),
    "load_of_another_model": (
        "--load {d}/trained --num-layers 2",
        "another recipe (model.num_layers was 4, now 2)",
    ),
    "load_of_another_seed": ("--load {d}/trained --seed 1", "another recipe (train.seed was 1234, now 1)"),
    "weights_missing": ("--pretrained-checkpoint {d}/nowhere", "nowhere holds no checkpoint"),
    "weights_of_another_model": (
        "--pretrained-checkpoint {d}/trained --hidden-size 32",
        "hidden_size=32, but {d}/trained has 64; leave hidden_size out",
    ),
    "save_of_another_recipe": (
        "--save {d}/trained --lr 1",
        "another recipe (optimizer.lr was 0.001, now 1.0)",
    ),
    "save_without_load": ("--save {d}/trained", "already holds a run; resume it with --load"),
    "save_is_a_file": ("--save {d}/train.json", "train.json is a file; choose a folder"),
}
# What an optional library is needed for, where it is missing.
OPTIONAL: dict[str, tuple[str, str]] = {
    "triton": ("--kernels triton", "kernels: impl='triton' is not installed (pip install"),
    "wandb": ("--wandb-project mine", "wandb_project needs Weights & Biases; `pip install wandb`"),
    "transformer_engine": ("--transformer-impl transformer_engine", "but it is not installed here"),
}
RUNS |= {f"no_{name}": row for name, row in OPTIONAL.items() if importlib.util.find_spec(name) is None}
DRY_RUNS = (
    "indivisible_batch",
    "missing_image",
    "wrong_vision_tower",
    "trainable_matches_nothing",
    "save_without_load",
)
