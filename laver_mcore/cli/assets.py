"""What a recipe reads and is not here yet, and the command that fetches what is published."""

from pathlib import Path

from laver_mcore.config.schema import Config

MODELS = {
    "Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
    "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "siglip2-so400m-patch14-384": "google/siglip2-so400m-patch14-384",
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "dinov2-large": "facebook/dinov2-large",
    "dinov2-base": "facebook/dinov2-base",
    "aimv2-large-patch14-native": "apple/aimv2-large-patch14-native",
    "Qwen2.5-VL-7B-Instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
}
"""Folder in the shipped recipes -> repository on the Hugging Face Hub."""
DATA = {
    "LLaVA-Pretrain": "liuhaotian/LLaVA-Pretrain",
    "FineVision": "HuggingFaceM4/FineVision",
    "LLaVA-OneVision": "lmms-lab/LLaVA-OneVision-Data",
    "LLaVA-NeXT": "lmms-lab/LLaVA-NeXT-Data",
}


def missing(config: Config) -> dict[str, list[str]]:
    """Paths of a recipe that do not exist -> the flags that name them."""
    data, vision, run, target = config.data, config.vision, config.run, config.objective.target_encoder()
    named: list[tuple[str, str | None]] = [("data_path", path) for path in data.data_path]
    named += [("image_folder", data.image_folder), ("tokenizer_model", data.tokenizer_model)]
    named += [("hf_path", run.hf_path), ("pretrained_checkpoint", run.pretrained_checkpoint)]
    named += [("vision_path", vision.vision_path)]
    named += [("target_path", target.path)] if target is not None else []
    found: dict[str, list[str]] = {}
    for flag, path in named:
        if path is not None and not Path(path).exists():
            found.setdefault(str(path), []).append(flag)
    return found


def how_to_get(path: str) -> str:
    """A line about one of them: the command that fetches it, or where it comes from otherwise."""
    where = Path(path)
    if where.name in MODELS:
        return f"hf download {MODELS[where.name]} --local-dir {path}"
    folder = next((part for part in where.parts if part in DATA), None)
    if folder is None:
        return "yours to give"
    root = Path(*where.parts[: where.parts.index(folder) + 1])
    made = f"; docs/data.md makes {where.name} of it" if where.name.startswith("sample") else ""
    return f"hf download {DATA[folder]} --repo-type dataset --local-dir {root}{made}"
