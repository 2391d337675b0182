r"""Generates text from a checkpoint.

    python -m launch.generate --checkpoint=FOLDER --prompt="Once upon a time"
    python -m launch.generate --config=configs/demo.py --simulate_devices=8 --mesh=data:2,model:4
    python -m launch.generate --checkpoint=FOLDER --prompt="Q: Why?\nA:" --sampler="temperature(0.7) top_p(0.9)" --n=3
    python -m launch.generate --checkpoint=FOLDER --chat

Several prompts run together. With --chat each line of the terminal is a message, answered as the checkpoint's chat
template has it; the end of the input (Ctrl-D) ends the conversation. The text goes to standard output as it comes,
everything else to standard error.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from absl import flags

from sharded_llama.engine.llm import LLM, Stream, Timings
from sharded_llama.engine.outputs import RequestOutput, StreamEvent
from sharded_llama.errors import RequestError
from sharded_llama.mesh import broadcast_from_main

from . import common, engine_flags, prompts as prompt_flags, sampling_flags
from .chat import converse

flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(prompt_flags)
flags.adopt_module_key_flags(engine_flags)
flags.adopt_module_key_flags(sampling_flags)

CHAT = flags.DEFINE_bool("chat", False, "Hold a conversation on the terminal.")
SYSTEM = flags.DEFINE_string("system", None, "System message of the conversation.")
OUTPUT = flags.DEFINE_string("output", None, "Write the answers to this file as JSON lines.")


def read_prompts() -> list[str]:
    """Prompts of --prompt and --prompt_file; of the config when there are none."""
    prompts = prompt_flags.given_prompts() or list(common.setting("generate", "prompts") or [])
    if not prompts:
        raise RequestError(
            "no prompt: give --prompt='...', --prompt='' to start from BOS alone, or --prompt_file=FILE."
        )
    return prompts


class Printer:
    """Prints answers in the order of prompts and answers, the first unfinished one as it comes."""

    def __init__(self, prompts: list[str], n: int):
        self.prompts, self.n = prompts, n
        self.current = -1
        self.texts = [""] * (len(prompts) * n)
        self.done = [False] * len(self.texts)

    def add(self, event: StreamEvent) -> None:
        if self.current < 0:  # nothing is printed before the first token is there
            self._next()
        number = event.request * self.n + event.index
        self.texts[number] += event.text
        self.done[number] = event.finish_reason is not None
        if number == self.current:
            self._write(event.text)
            while self.current < len(self.texts) and self.done[self.current]:
                self._write("\n")
                self._next()

    def _next(self) -> None:
        """Goes to the next answer and prints its prompt, with what is there of it."""
        self.current += 1
        if self.current < len(self.texts):
            request, index = divmod(self.current, self.n)
            self._write(self._heading(request, index) + self.prompts[request] + self.texts[self.current])

    def _heading(self, request: int, index: int) -> str:
        """The line above an answer; none when there is but one."""
        parts = [f"prompt {request + 1} of {len(self.prompts)}"] if len(self.prompts) > 1 else []
        parts += [f"answer {index + 1} of {self.n}"] if self.n > 1 else []
        return f"--- {', '.join(parts)} ---\n" if parts else ""

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


def records(outputs: list[RequestOutput]) -> list[dict[str, object]]:
    """One for each answer, for a line of JSON."""
    fields = ("index", "text", "token_ids", "finish_reason", "stop_reason")
    rows = []
    for output in outputs:
        for answer in output.outputs:
            row = {"prompt": output.prompt} | {field: getattr(answer, field) for field in fields}
            if answer.logprobs is not None:
                row["logprobs"] = [
                    [{"token_id": token} | dataclasses.asdict(found) for token, found in of_token.items()]
                    for of_token in answer.logprobs
                ]
            rows.append(row)
    return rows


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
    settings = sampling_flags.sampling_settings()
    options = engine_flags.engine_options()
    if "entropy" in settings:
        options["entropy_sampler"] = True
    if CHAT.value:
        check_chat(settings)
        converse(common.load_model(**options), SYSTEM.value, settings)
        return
    if SYSTEM.value is not None:
        raise RequestError("--system belongs to a conversation: add --chat.")
    if sampling_flags.LOGPROBS.value is not None and not OUTPUT.value:
        raise RequestError("--logprobs are written with the answers: add --output=FILE.")
    # Every process has to run the same prompts; only process 0 needs to have them, and it alone writes.
    prompts = broadcast_from_main(read_input)
    llm = common.load_model(**options)
    answer(llm, llm.stream(prompts, **settings), Printer(prompts, settings.get("n", 1)))


def check_chat(settings: dict[str, object]) -> None:
    """Raises RequestError for flags that do not go with a conversation."""
    given = {"--prompt": prompt_flags.PROMPT.value, "--prompt_file": prompt_flags.PROMPT_FILE.value}
    given |= {"--output": OUTPUT.value, "--logprobs": settings["logprobs"] is not None}
    given["--n"] = settings.get("n", 1) > 1
    for name, value in given.items():
        if value:
            raise RequestError(f"{name} does not go with --chat, which asks on the terminal and answers there once.")


def answer(llm: LLM, stream: Stream, printer: Printer) -> None:
    """Prints and writes what a stream brings; process 0 alone has the events."""
    for event in stream:
        printer.add(event)
    if not common.is_main_process():
        return
    print(summary(llm, stream.timings), file=sys.stderr)
    if OUTPUT.value:
        write_output(Path(OUTPUT.value), records(stream.outputs()))


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
