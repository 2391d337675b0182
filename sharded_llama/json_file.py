"""Reading and writing the JSON files of a checkpoint folder."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import ConfigError, ShardedLlamaError

MAX_BYTES = 64 << 20


def read_json_object(path: str | os.PathLike, error: type[ShardedLlamaError] = ConfigError) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises `error`, naming the file, when it is missing, unreadable, not JSON, or JSON but not an object.
    """
    path = Path(path)
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)  # a pipe, a device
    if special or (os.path.isfile(path) and os.path.getsize(path) > MAX_BYTES):
        raise error(f"{path} is not a regular file of {MAX_BYTES} bytes at most.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except OSError as e:
        raise error(f"{path} cannot be read: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or nested without end
        raise error(f"{path} is not valid JSON: {e}.") from e
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object {{...}}, but it holds a {type(value).__name__}.")
    return value


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented."""
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
