r"""Generates text from a checkpoint.

    python -m launch.generate --checkpoint=FOLDER --prompt="Once upon a time"
    python -m launch.generate --config=configs/demo.py --simulate_devices=8 --mesh=data:2,model:4
    python -m launch.generate --checkpoint=FOLDER --chat

Several prompts run together. With --chat each line of the terminal is a message, answered as the checkpoint's chat
template has it; the end of the input (Ctrl-D) ends the conversation. The text goes to standard output as it comes,
everything else to standard error.
"""

import json
import os
import sys
from pathlib import Path

from absl import flags

from sharded_llama.engine.llm import LLM, Stream, Timings
from sharded_llama.errors import RequestError
from sharded_llama.mesh import broadcast_from_main
from sharded_llama.sampling import SamplingParams

from . import common, engine_flags, prompts as prompt_flags
from .chat import converse

flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(prompt_flags)
flags.adopt_module_key_flags(engine_flags)

MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Most new tokens per prompt. Default: 128.", 1)
TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy. Default: the checkpoint's, else 0.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample from this many most likely tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample from the most likely tokens that hold this mass.")
MIN_P = flags.DEFINE_float("min_p", None, "Drop tokens less likely than this times the most likely one.")
SEED = flags.DEFINE_integer("seed", None, "Seed of the sampling; default: a new one each time.")
IGNORE_EOS = flags.DEFINE_bool("ignore_eos", None, "Generate past end-of-sequence tokens.")
CHAT = flags.DEFINE_bool("chat", False, "Hold a conversation on the terminal.")
SYSTEM = flags.DEFINE_string("system", None, "System message of the conversation.")
OUTPUT = flags.DEFINE_string("output", None, "Write the answers to this file as JSON lines.")

DEFAULT_MAX_NEW_TOKENS = 128


def read_prompts() -> list[str]:
    """Prompts of --prompt and --prompt_file; of the config when there are none."""
    prompts = prompt_flags.given_prompts() or list(common.setting("generate", "prompts") or [])
    if not prompts:
        raise RequestError(
            "no prompt: give --prompt='...', --prompt='' to start from BOS alone, or --prompt_file=FILE."
        )
    return prompts


def sampling_settings() -> dict[str, object]:
    """Sampling parameters that flags or config give; what is left out has the checkpoint's default."""
    given = {
        "max_tokens": common.setting("generate", "max_new_tokens", MAX_NEW_TOKENS.value),
        "ignore_eos": IGNORE_EOS.value,
    }
    if given["max_tokens"] is None:
        given["max_tokens"] = DEFAULT_MAX_NEW_TOKENS
    for flag in (TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED):
        given[flag.name] = common.setting("generate", flag.name, flag.value)
    return given


class Printer:
    """Prints answers in the order of their prompts, the first unfinished one as it comes."""

    def __init__(self, prompts: list[str]):
        self.prompts = prompts
        self.current = -1
        self.texts = [""] * len(prompts)
        self.done = [False] * len(prompts)

    def add(self, request: int, text: str, finished: bool) -> None:
        if self.current < 0:  # nothing is printed before the first token is there
            self._next()
        self.texts[request] += text
        self.done[request] = finished
        if request == self.current:
            self._write(text)
            while self.current < len(self.prompts) and self.done[self.current]:
                self._write("\n")
                self._next()

    def _next(self) -> None:
        """Goes to the next prompt and prints it, with what is there of its answer."""
        self.current += 1
        if self.current < len(self.prompts):
            separator = f"--- prompt {self.current + 1} of {len(self.prompts)} ---\n" if len(self.prompts) > 1 else ""
            self._write(separator + self.prompts[self.current] + self.texts[self.current])

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def summary(llm: LLM, t: Timings) -> str:
    data, model = llm.mesh.shape.values()
    device = llm.mesh.devices.flat[0]
    return (
        f"{t.prompt_tokens} prompt tokens, {t.new_tokens} new tokens, "
        f"{1e3 * t.first_token_s:.0f} ms to first token, {t.tokens_per_s:.1f} tokens/s "
        f"(after {t.compile_s:.1f} s of compilation)\n"
        f"mesh data:{data},model:{model} on {data * model} {device.platform} devices ({device.device_kind}), "
        f"{llm.config.dtype}, {llm.backend} attention"
    )


def check_output(name: str) -> None:
    """Raises RequestError when the answers could not be written, before they are made."""
    path = Path(name)
    if not path.absolute().parent.is_dir():
        raise RequestError(f"--output={name}: its folder does not exist.")
    if path.is_dir():
        raise RequestError(f"--output={name} is a folder; name a file.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise RequestError(f"--output={name}: its folder cannot be written to.")


def write_output(path: Path, records: list[dict[str, object]]) -> None:
    """Writes JSON lines under a temporary name first, so that the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, path)


def read_input() -> list[str]:
    """The prompts, after a check of where the answers go."""
    if OUTPUT.value:
        check_output(OUTPUT.value)
    return read_prompts()


def main() -> None:
    settings = sampling_settings()
    SamplingParams.make({}, **settings)  # a mistake shows before the model is loaded
    if CHAT.value:
        check_chat()
        converse(common.load_model(**engine_flags.engine_options()), SYSTEM.value, settings)
        return
    if SYSTEM.value is not None:
        raise RequestError("--system belongs to a conversation: add --chat.")
    # Every process has to run the same prompts; only process 0 needs to have them, and it alone writes.
    prompts = broadcast_from_main(read_input)
    llm = common.load_model(**engine_flags.engine_options())
    answer(llm, llm.stream(prompts, **settings), prompts)


def check_chat() -> None:
    """Raises RequestError for flags that do not go with a conversation."""
    given = {"--prompt": prompt_flags.PROMPT.value, "--prompt_file": prompt_flags.PROMPT_FILE.value}
    given["--output"] = OUTPUT.value
    for name, value in given.items():
        if value:
            raise RequestError(f"{name} does not go with --chat, which reads messages from the terminal.")


def answer(llm: LLM, stream: Stream, prompts: list[str]) -> None:
    """Prints and writes what a stream brings."""
    printer = Printer(prompts) if common.is_main_process() else None
    texts, tokens, reasons = [""] * len(prompts), [[] for _ in prompts], [""] * len(prompts)
    for event in stream:
        texts[event.request] += event.text
        tokens[event.request] += event.token_ids
        reasons[event.request] = event.finish_reason
        if printer:
            printer.add(event.request, event.text, event.finish_reason is not None)
    if not common.is_main_process():
        return
    print(summary(llm, stream.timings), file=sys.stderr)
    if OUTPUT.value:
        fields = ("prompt", "text", "token_ids", "finish_reason")
        rows = zip(prompts, texts, tokens, reasons, strict=True)
        write_output(Path(OUTPUT.value), [dict(zip(fields, row, strict=True)) for row in rows])


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
