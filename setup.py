"""Package laver_mcore: the training engine, its kernels, and the command `laver`.

The kernels are also a distribution of their own (`kernels/`) for those who want nothing else; whoever installs this one
has them already.
"""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

setup(
    name="laver-mcore",
    version=VERSION,
    description="Megatron-style training of vision-language models with latent visual reconstruction (LaVer).",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["laver_mcore", "laver_mcore.*"])
    + find_packages("kernels", include=["laver_kernels*"]),
    package_dir={"laver_kernels": "kernels/laver_kernels"},
    package_data={"laver_kernels": ["py.typed"]},
    py_modules=["pretrain_laver"],
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.17",
        "tyro>=1.0",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "numpy>=2.0",
        "pillow>=12.3,<13",
        "psutil>=6.0",  # without it Megatron's checkpoint writer dies and a save hangs
        "jinja2>=3.1",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    entry_points={
        "console_scripts": ["laver = laver_mcore.cli.main:laver"],
        "lmms_eval.models": ["laver = laver_mcore.evaluation.lmms_adapter:model_manifest"],
    },
    extras_require={
        "demo": ["scikit-learn>=1.6", "scikit-image>=0.25", "matplotlib>=3.10"],
        "data": ["nvidia-dali-cuda130==2.4.0", "pyarrow>=26.0"],
        "wandb": ["wandb"],
        "triton": ["triton>=3.6"],
    },
)
