"""Every file in configs/: loads as launchers load it, says what the real config.json says, and fits a mesh."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from sharded_llama.config import LlamaConfig, check_matches
from sharded_llama.mesh import default_mesh, make_mesh
from sharded_llama.weights import abstract_weights, count_parameters

# ml_collections loads config files by a method that importlib deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
DATA = ROOT / "../shared/data/hf_configs"

REAL = {
    "llama2_7b": "Llama-2-7b-hf",
    "llama3_1_8b": "Llama-3.1-8B",
    "llama3_1_70b": "Llama-3.1-70B",
    "llama3_1_405b": "Llama-3.1-405B",
    "llama3_2_1b": "Llama-3.2-1B-Instruct",
    "llama3_2_3b": "Llama-3.2-3B-Instruct",
}

# Parameters in billions, from the model cards and papers.
PARAMETERS = {
    "llama2_7b": 6.738,
    "llama2_13b": 13.016,
    "llama2_70b": 68.977,
    "llama3_8b": 8.030,
    "llama3_70b": 70.554,
    "llama3_1_8b": 8.030,
    "llama3_1_70b": 70.554,
    "llama3_1_405b": 405.853,
    "llama3_2_1b": 1.236,
    "llama3_2_3b": 3.213,
    "llama3_3_70b": 70.554,
    "llama_160m": 0.160,
}


NAMES = ["demo", *PARAMETERS]


def load(name: str, *overrides: str) -> ConfigDict:
    """Loads configs/`name`.py through a --config flag, as launchers do."""
    values, argv = flags.FlagValues(), ["program", f"--config={ROOT / 'configs' / name}.py", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def test_every_model_is_here():
    assert {path.stem for path in FILES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_settings(name):
    config = load(name)
    assert set(config.model) == {field.name for field in dataclasses.fields(LlamaConfig)}
    assert config.mesh.to_dict() == {"data": None, "model": None}
    assert config.checkpoint == ("demo" if name == "demo" else None)
    sampling = dict.fromkeys(("sampler", "temperature", "top_k", "top_p", "min_p", "seed"))
    prompts = {"prompts": ("First Citizen:\n",)} if name == "demo" else {}
    assert config.generate.to_dict() == {"max_new_tokens": 128} | sampling | prompts


def test_overrides():
    config = load(
        "llama3_1_8b",
        "--config.mesh.model=4",
        "--config.checkpoint=some/folder",
        "--config.generate.temperature=0.5",
        "--config.generate.top_k=40",
        "--config.model.n_layers=2",
        "--config.model.rope_scaling.factor=16",
        "--config.model.eos_ids=(1,2)",
    )
    assert (config.mesh.model, config.mesh.data, config.checkpoint) == (4, None, "some/folder")
    assert (config.generate.temperature, config.generate.top_k) == (0.5, 40)
    model = LlamaConfig.from_dict(config.model)
    assert (model.n_layers, model.rope_scaling.factor, model.eos_ids) == (2, 16.0, (1, 2))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real config.json files of ../shared/data/hf_configs")
@pytest.mark.parametrize("name", REAL)
def test_numbers_are_those_of_the_real_checkpoint(name):
    ours = LlamaConfig.from_dict(load(name).model)
    theirs = LlamaConfig.from_hf(DATA / f"{REAL[name]}.json")
    assert ours == theirs
    check_matches(ours, theirs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    config = LlamaConfig.from_dict(load(name).model)
    assert count_parameters(config) / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("data", "model"), [(1, 8), (2, 4)])
def test_fits_eight_devices(name, data, model):
    config = LlamaConfig.from_dict(load(name).model)
    mesh = make_mesh(data, model)
    leaves = jax.tree.leaves(abstract_weights(config, mesh))
    held = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
    assert held >= count_parameters(config) // model
    assert all(leaf.dtype == config.jnp_dtype for leaf in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_default_mesh_uses_all_devices(name):
    assert default_mesh(LlamaConfig.from_dict(load(name).model)).size == 8
