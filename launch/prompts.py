"""The flags that give prompts, for every launcher that takes some."""

import json
import sys
from pathlib import Path

from absl import flags

from sharded_llama.errors import RequestError

PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt; repeatable. An empty one starts from BOS alone.")
PROMPT_FILE = flags.DEFINE_string(
    "prompt_file",
    None,
    "File whose text is a prompt; '-' is standard input. A .jsonl file gives a prompt per line: {\"prompt\": ...}.",
)


def given_prompts() -> list[str]:
    """The prompts of --prompt and --prompt_file. Raises RequestError when the file cannot be read or holds none.

    Standard input can be read once only, and so can the prompts.
    """
    return list(PROMPT.value) + ([] if PROMPT_FILE.value is None else _read_prompt_file(PROMPT_FILE.value))


def _read_prompt_file(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompt_file={name}: cannot be read as UTF-8 text: {error}.") from error
    if not name.endswith(".jsonl"):
        return [text.removesuffix("\n")]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, TypeError, KeyError, RecursionError):
                prompts.append(None)
            if not isinstance(prompts[-1], str):
                raise RequestError(
                    f'--prompt_file={name}, line {number}: expected an object like {{"prompt": "text"}}.'
                )
    if not prompts:
        raise RequestError(f"--prompt_file={name}: has no prompts.")
    return prompts
