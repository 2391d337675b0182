"""The settings of a run, as the files in `configs/` return them and launchers override them by flags."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from .config import LlamaConfig


def run_config(model: LlamaConfig, checkpoint: str | None = None) -> ConfigDict:
    """The settings of a run of `model`; each can be overridden, as in `--config.generate.temperature=0.7`.

    - `model`: exactly the fields of LlamaConfig, for `LlamaConfig.from_dict`.
    - `checkpoint`: folder to load, or "demo" for the model inside the package; None: none was chosen.
    - `mesh.data`, `mesh.model`: sizes of the mesh; None: `default_mesh`.
    - `generate`: `max_new_tokens` in tokens, sampling parameters (None: the checkpoint's default), `seed`, and
      `sampler`, a text that says several of them, as --sampler takes it.
    """
    sampling = {name: config_dict.placeholder(float) for name in ("temperature", "top_p", "min_p")}
    integers = {name: config_dict.placeholder(int) for name in ("top_k", "seed")}
    return ConfigDict(
        {
            "model": dataclasses.asdict(model),
            "checkpoint": checkpoint or config_dict.placeholder(str),
            "mesh": {"data": config_dict.placeholder(int), "model": config_dict.placeholder(int)},
            "generate": {"max_new_tokens": 128, "sampler": config_dict.placeholder(str)} | sampling | integers,
        }
    )
