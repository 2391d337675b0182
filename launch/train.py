r"""Trains a model from random weights on a text file and exports it as a Hugging Face checkpoint.

    python -m launch.train --config=configs/demo.py --text=FILE --output=FOLDER
    python -m launch.train --config=configs/demo.py --text=FILE --output=FOLDER --simulate_devices=8 \
        --mesh=data:2,model:4 --config.train.steps=100

Started again with the same settings, on the same or another mesh, it resumes where its last state was saved. FOLDER
gets `checkpoint` (the weights with the lowest held-out loss), `loss.png` and `log.jsonl`.
"""

from pathlib import Path

from absl import flags

from sharded_llama.config import LlamaConfig
from sharded_llama.errors import TrainingError
from sharded_llama.training.settings import TrainSettings

from . import common

flags.adopt_module_key_flags(common)

TEXT = flags.DEFINE_string("text", None, "UTF-8 text file to train on; the end of it is held out.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the run: a new one, or that of a run to resume.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Folder of a tokenizer to use. Default: one is trained on the text, of config.model.vocab_size."
)

EXTRA = ("optax", "orbax", "matplotlib")  # needed for training alone


def check_flags() -> None:
    """Raises TrainingError for a flag that is missing or that training does not have."""
    if common.CONFIG.value is None:
        raise TrainingError("no model: give --config=FILE, such as --config=configs/demo.py.")
    for flag, what in ((TEXT, "FILE, the text to train on"), (OUTPUT, "FOLDER, where the run is kept")):
        if not flag.value:
            raise TrainingError(f"give --{flag.name}={what}.")
    for flag in (common.CHECKPOINT, common.ATTENTION, common.DTYPE):
        if flag.value is not None:
            raise TrainingError(
                f"--{flag.name} is not a setting of training, which starts from random weights. Types are "
                "--config.train.compute_dtype and --config.train.export_dtype."
            )


def main() -> None:
    check_flags()
    try:
        from sharded_llama.training.loop import train
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA:
            raise
        raise TrainingError(f"training needs {package}: pip install 'sharded-llama[train]'.") from error
    config = LlamaConfig.from_dict(common.CONFIG.value.get("model") or {})
    settings = TrainSettings.from_dict(common.CONFIG.value.get("train") or {})
    tokenizer = Path(TOKENIZER.value) if TOKENIZER.value else None
    # Without --mesh: one that repeats no kv heads, which training cannot do.
    mesh = common.choose_mesh(config.replace(n_heads=config.n_kv_heads))
    train(config, settings, Path(TEXT.value), Path(OUTPUT.value), mesh=mesh, tokenizer=tokenizer)


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
