r"""Generates text from a checkpoint.

    python -m launch.generate --checkpoint=FOLDER --prompt="Once upon a time"
    python -m launch.generate --config=configs/demo.py --simulate_devices=8 --mesh=data:2,model:4
    python -m launch.generate --checkpoint=FOLDER --prompt="Q: Why?\nA:" --sampler="temperature(0.7) top_p(0.9)" --n=3
    python -m launch.generate --checkpoint=FOLDER --prompt="Once upon a time" --sampler=entropy --show_metrics
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
from typing import Any

from absl import flags

from sharded_llama.engine.llm import LLM, Stream, Timings
from sharded_llama.engine.outputs import RequestOutput
from sharded_llama.errors import EngineError, RequestError
from sharded_llama.mesh import broadcast_from_main

from . import common, engine_flags, metrics_flags, prompts as prompt_flags, sampling_flags
from .chat import converse
from .printer import Printer

flags.adopt_module_key_flags(common)
flags.adopt_module_key_flags(prompt_flags)
flags.adopt_module_key_flags(engine_flags)
flags.adopt_module_key_flags(sampling_flags)
flags.adopt_module_key_flags(metrics_flags)

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


def summary(llm: LLM, t: Timings) -> str:
    data, model = llm.mesh.shape.values()
    device = llm.mesh.devices.flat[0]
    counts = llm.engine.stats().scheduler
    guesses = ""
    if counts.drafted_tokens:
        share = counts.accepted_tokens / counts.drafted_tokens
        guesses = f"{counts.drafted_tokens} tokens drafted, {counts.accepted_tokens} accepted ({share:.0%})\n"
    return (
        f"{t.prompt_tokens} prompt tokens, {t.new_tokens} new tokens, "
        f"{1e3 * t.first_token_s:.0f} ms to first token, {t.tokens_per_s:.1f} tokens/s "
        f"(after {t.compile_s:.1f} s of compilation)\n{guesses}"
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
            if answer.error:
                row["error"] = answer.error
            if metrics_flags.SHOW_METRICS.value:
                row["metrics"] = metrics_flags.metrics_records(answer)
            rows.append(row)
    return rows


def write_output(path: Path, records: list[dict[str, object]]) -> None:
    """Writes JSON lines under a temporary name first, so that the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, path)


def read_input(n: int) -> list[str]:
    """The prompts, after a check of where the answers, n to each, go."""
    if OUTPUT.value:
        check_output(OUTPUT.value)
    prompts = read_prompts()
    metrics_flags.check_view(n * len(prompts))
    return prompts


def main() -> None:
    settings = sampling_flags.sampling_settings()
    options = engine_flags.engine_options()
    metrics_flags.check_flags(settings)
    if "entropy" in settings:
        if options["num_speculative_tokens"] is not None:
            raise RequestError("--num_speculative_tokens does not go with the entropy sampler: leave one of them out.")
        options["entropy_sampler"] = True
    if metrics_flags.SHOW_METRICS.value and options["decode_steps"] is None:
        options["decode_steps"] = 1  # each token has a text, and so a tint, of its own
    if CHAT.value:
        check_chat(settings)
        converse(load_model(options), SYSTEM.value, settings)
        return
    if SYSTEM.value is not None:
        raise RequestError("--system belongs to a conversation: add --chat.")
    if sampling_flags.LOGPROBS.value is not None and not OUTPUT.value:
        raise RequestError("--logprobs are written with the answers: add --output=FILE.")
    # Every process has to run the same prompts; only process 0 needs to have them, and it alone writes.
    n = settings.get("n", 1)
    prompts = broadcast_from_main(lambda: read_input(n))
    llm = load_model(options)
    stream = llm.stream(prompts, **settings)
    answer(llm, stream, Printer(prompts, n, metrics_flags.make_view() if common.is_main_process() else None))


def load_model(options: dict[str, Any]) -> LLM:
    return common.load_model(draft_model=engine_flags.DRAFT_MODEL.value, **options)


def check_chat(settings: dict[str, Any]) -> None:
    """Raises RequestError for flags that do not go with a conversation."""
    given = {"--prompt": prompt_flags.PROMPT.value, "--prompt_file": prompt_flags.PROMPT_FILE.value}
    given |= {"--output": OUTPUT.value, "--logprobs": settings["logprobs"] is not None}
    given |= {"--n": settings.get("n", 1) > 1, "--show_metrics": metrics_flags.SHOW_METRICS.value}
    for name, value in given.items():
        if value:
            raise RequestError(f"{name} does not go with --chat, which asks on the terminal and answers there once.")


def answer(llm: LLM, stream: Stream, printer: Printer) -> None:
    """Prints and writes what a stream brings; process 0 alone has the events.

    Raises EngineError at the end when an answer has ended with an error.
    """
    for event in stream:
        printer.add(event)
    if not common.is_main_process():
        return
    print(summary(llm, stream.timings), file=sys.stderr)
    outputs = stream.outputs()
    if OUTPUT.value:
        write_output(Path(OUTPUT.value), records(outputs))
    for path in metrics_flags.draw_pictures(outputs, llm.tokenizer):
        print(f"picture: {path}", file=sys.stderr)
    check_errors(outputs)


def check_errors(outputs: list[RequestOutput]) -> None:
    """Raises EngineError that says which answers ended with an error, and why."""
    answers = [(number, answer) for number, output in enumerate(outputs, 1) for answer in output.outputs]
    failed = [f"prompt {n}, answer {a.index + 1}: {a.error}" for n, a in answers if a.error]
    if failed:
        raise EngineError("\n  ".join([f"{len(failed)} of {len(answers)} answers ended with an error:", *failed]))


def cli() -> None:
    common.run(main)


if __name__ == "__main__":
    cli()
