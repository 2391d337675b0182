"""Packaging: `launch/` and `configs/` are installed inside the package, as sharded_llama.launch and .configs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "sharded_llama/__init__.py").read_text(), re.MULTILINE)[1]

ORBAX = ["orbax-checkpoint>=0.12.4"]
META = ["sentencepiece>=0.2", "tiktoken>=0.9"]  # the tokenizers of Meta's checkpoints
HUB = ["huggingface_hub>=1.33"]
STRUCTURED = ["llguidance>=1.9.1"]  # what an answer may contain: schemas, grammars
VIEW = ["matplotlib>=3.8", "rich>=13.7"]  # how sure a model was, tinted and as a picture
PARITY = ["matplotlib>=3.8", "torch>=2.6", "transformers>=5.0"]
TRAIN = ["matplotlib>=3.8", "optax>=0.2.8", *ORBAX]
LINT = ["ruff==0.17.6"]  # exact: another version formats differently

setup(
    name="sharded-llama",
    version=VERSION,
    description="A JAX inference engine for Llama-family models on a (data, model) device mesh",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["sharded_llama", "sharded_llama.*"]),
        "sharded_llama.launch",
        "sharded_llama.configs",
    ],
    package_dir={"sharded_llama.launch": "launch", "sharded_llama.configs": "configs"},
    package_data={"sharded_llama": ["demo_checkpoint/*"]},
    install_requires=[
        "absl-py>=2.1",
        "flatbuffers>=24.3",  # jax.export keeps traced steps with it
        "jax>=0.10.2",
        "jinja2>=3.1.6",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "tokenizers>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "server": ["fastapi>=0.115", "prometheus_client>=0.20", "uvicorn>=0.30"],
        "meta": META,
        "orbax": ORBAX,
        "hub": HUB,
        "structured": STRUCTURED,
        "view": VIEW,
        "parity": PARITY,
        "train": TRAIN,
        "lint": LINT,
        "test": [
            *TRAIN,
            *META,
            *HUB,
            *STRUCTURED,
            *VIEW,
            *LINT,
            "build>=1.2",
            "hypothesis>=6.100",
            "jsonschema>=4.18",
            "protobuf>=5",  # sentencepiece trains and describes models with it
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "safetensors>=0.5",
            "setuptools>=77",
            "torch==2.13.0",
            "transformers>=5.0",
        ],
    },
    entry_points={"console_scripts": ["sharded-llama = sharded_llama.launch.cli:main"]},
)
