"""What every launcher shares: the flags that say which model runs where, and how mistakes are reported."""

import logging as stdlib_logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from sharded_llama.attention import BACKENDS
from sharded_llama.checkpoint import CheckpointSource, open_checkpoint
from sharded_llama.config import DTYPES, LlamaConfig, check_matches
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import checkpoint_folder
from sharded_llama.engine.memory import FRACTION_VARIABLES, given_fraction
from sharded_llama.errors import ConfigError, MeshError, ShardedLlamaError
from sharded_llama.mesh import default_mesh, make_mesh, parse_mesh, simulate_cpu_devices, start_distributed

CONFIG = config_flags.DEFINE_config_file("config", None, "Model and settings, such as configs/demo.py.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Checkpoint folder, name on the Hugging Face hub such as meta-llama/Llama-3.2-1B, or 'demo' for the bundled one.",
)
MESH = flags.DEFINE_string(
    "mesh", None, "Mesh sizes such as data:2,model:4 (short for config.mesh). Default: every device."
)
DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Type of weights, activations and cache. Default: the checkpoint's.")
ROPE_FACTOR = flags.DEFINE_float(
    "rope_factor",
    None,
    "Factor of the scaled rotary embeddings of a Meta checkpoint, whose params.json cannot say it. Default: what our "
    "exporter wrote beside it, else 32 for the shapes of Llama 3.2 1B and 3B, else 8.",
    1.0,
)
ATTENTION = flags.DEFINE_enum("attention", None, BACKENDS, "Attention backend. Default: the fastest that can run.")
SIMULATE_DEVICES = flags.DEFINE_integer("simulate_devices", None, "Run on this many simulated CPU devices.", 1, 256)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0 of a multi-process run, or 'auto' where JAX detects the cluster.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of a multi-process run.", 1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.", 0)

GPU_FRACTION = "0.95"  # of a GPU's memory for JAX; the rest is for the driver and its libraries
CONFIGS = Path(__file__).parent.parent / "configs"  # in a checkout and in the installed package alike


def run(main: Callable[[], None]) -> None:
    """Parses flags, starts JAX as they say and runs `main`. A user's mistake prints one message and exits with 1."""

    def guarded(argv: list[str]) -> None:
        try:
            if argv[1:]:
                raise ConfigError(f"unexpected argument {argv[1]!r}; every setting is a flag such as --prompt='...'.")
            _start_jax()
            main()
        except ShardedLlamaError as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(stdlib_logging.Formatter("%(message)s"))
    stdlib_logging.getLogger("jax").setLevel(stdlib_logging.WARNING)  # it tells of every platform that is not there
    try:
        argv = [sys.argv[0], *map(_find_config, _joined(sys.argv[1:]))]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    app.run(guarded, argv=argv, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl reports a wrong flag itself, but not a wrong override of the config such as --config.mesh.modl=4."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        overrides = ", ".join(arg for arg in argv if arg.lstrip("-").startswith("config")) or "the flags"
        missing = "the config has no such setting: " if isinstance(error, (AttributeError, KeyError)) else ""
        print(f"error: {overrides}: {missing}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _joined(args: list[str]) -> list[str]:
    """The arguments with `--config FILE` written as `--config=FILE`."""
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1] in ("--config", "-config"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _find_config(arg: str) -> str:
    """Lets --config=configs/x.py name a config that came with the package when there is no such file here."""
    flag, equals, path = arg.partition("=")
    if flag not in ("--config", "-config") or not equals or os.path.exists(path):
        return arg
    packaged = CONFIGS / Path(path).name
    if Path(path).parent.name in ("", "configs") and packaged.exists():
        return f"{flag}={packaged}"
    names = ", ".join(f"configs/{p.name}" for p in sorted(CONFIGS.glob("*.py")) if p.stem != "__init__")
    raise ConfigError(f"--config={path}: there is no such file. Configs that come with the package: {names}.")


def _start_jax() -> None:
    if SIMULATE_DEVICES.value:
        simulate_cpu_devices(SIMULATE_DEVICES.value)
    # By itself JAX takes three quarters of a GPU.
    if given_fraction() is None:
        os.environ[FRACTION_VARIABLES[1]] = GPU_FRACTION
    if COORDINATOR.value:
        _keep_stdout_to_ourselves()
    start_distributed(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if DTYPE.value == "float64":
        jax.config.update("jax_enable_x64", True)


def _keep_stdout_to_ourselves() -> None:
    """Sends what C++ libraries print (gloo tells of its connections) to standard error instead of into our output."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def setting(section: str, name: str, flag_value: Any = None) -> Any:
    """The flag's value if given, else the config's `section.name`, else None."""
    if flag_value is not None or CONFIG.value is None:
        return flag_value
    return (CONFIG.value.get(section) or {}).get(name)


def checkpoint_name() -> str:
    """The checkpoint that --checkpoint or the config names."""
    name = CHECKPOINT.value or (CONFIG.value.get("checkpoint") if CONFIG.value else None)
    if not name:
        raise ConfigError("no checkpoint: give --checkpoint=FOLDER, or --checkpoint=demo for the bundled model.")
    return name


def choose_mesh(config: LlamaConfig) -> Mesh:
    """The mesh that --mesh or the config asks for; default: all devices."""
    if MESH.value is not None:
        return make_mesh(**parse_mesh(MESH.value))
    data, model = (setting("mesh", axis) for axis in ("data", "model"))
    if data is None and model is None:
        return default_mesh(config)
    for axis, size in (("data", data), ("model", model)):
        if size is not None and size < 1:
            raise MeshError(f"config.mesh.{axis}={size} must be at least 1.")
    return make_mesh(data or 1, model or 1)


def open_source() -> CheckpointSource:
    """The checkpoint of the flags. A config that disagrees with it is an error."""
    source = open_checkpoint(checkpoint_folder(checkpoint_name()), rope_factor=ROPE_FACTOR.value)
    if CONFIG.value is not None and "model" in CONFIG.value:
        check_matches(LlamaConfig.from_dict(CONFIG.value.model), source.read_config())
    return source


def load_model(source: CheckpointSource | None = None, **kwargs: Any) -> LLM:
    """The model of the flags, in its mesh: of `source` if the checkpoint is open already."""
    source = open_source() if source is None else source
    mesh = choose_mesh(source.read_config())
    return LLM(source, mesh=mesh, dtype=DTYPE.value, attention=ATTENTION.value, **kwargs)


def is_main_process() -> bool:
    """Whether this process writes the output."""
    return jax.process_index() == 0
