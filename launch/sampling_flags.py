"""The flags that say how answers are chosen and what ends them; the names are those of `SamplingParams`."""

from typing import Any

from absl import flags

from sharded_llama.errors import RequestError
from sharded_llama.mesh import broadcast_from_main
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.params import MAX_LOGPROBS, MAX_N
from sharded_llama.sampling.strings import FILTERS, parse_sampler
from sharded_llama.sampling.structured import StructuredOutputs

from . import common

MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Most new tokens per answer. Default: 128.", 1)
SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    "How tokens are chosen, in one text: 'greedy', 'temperature(0.7) top_p(0.9)', 'entropy(high_entropy=4)'. Also "
    "top_k, min_p, presence_penalty, frequency_penalty, repetition_penalty, seed, min_tokens.",
)
SETTINGS = (
    flags.DEFINE_float("temperature", None, "0 is greedy. Default: the checkpoint's, else 0."),
    flags.DEFINE_integer("top_k", None, "Sample from this many most likely tokens; 0: all."),
    flags.DEFINE_float("top_p", None, "Sample from the most likely tokens that hold this mass."),
    flags.DEFINE_float("min_p", None, "Drop tokens less likely than this times the most likely one."),
    flags.DEFINE_float("presence_penalty", None, "Subtracted from the logits of tokens that were generated."),
    flags.DEFINE_float("frequency_penalty", None, "Subtracted for every time that a token was generated."),
    flags.DEFINE_float("repetition_penalty", None, "Divides positive logits of tokens that were there; 1: off."),
    flags.DEFINE_integer("seed", None, "Seed of the sampling; default: a new one each time."),
    flags.DEFINE_integer("min_tokens", None, "Nothing ends an answer before it has this many tokens.", 0),
    flags.DEFINE_integer("n", None, "Answers to each prompt.", 1, MAX_N),
    flags.DEFINE_bool("ignore_eos", None, "Generate past end-of-sequence tokens."),
)
LOGPROBS = flags.DEFINE_integer(
    "logprobs",
    None,
    "Write each token's log-probability to --output, and those of this many of the most likely tokens.",
    0,
    MAX_LOGPROBS,
)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer and is not part of it; repeatable.")
JSON_SCHEMA = flags.DEFINE_string("json_schema", None, "File with a JSON schema that every answer follows.")
REGEX = flags.DEFINE_string("regex", None, "Regular expression that every answer matches as a whole.")
CHOICE = flags.DEFINE_multi_string("choice", [], "Text that an answer may be, and nothing else; repeatable.")
GRAMMAR = flags.DEFINE_string("grammar", None, "File with a grammar (Lark or GBNF) that every answer follows.")

DEFAULT_MAX_NEW_TOKENS = 128
MAX_FILE_BYTES = 1 << 20  # of a schema or grammar; what it may have is less


def sampling_settings() -> dict[str, Any]:
    """Fields of `SamplingParams` that flags or config give; what is left out has the checkpoint's default.

    Every process calls it. Raises RequestError for settings that contradict one another, for a file that cannot be
    read, and for values that no request can have.
    """
    given = _sampler_settings()
    max_tokens = common.setting("generate", "max_new_tokens", MAX_NEW_TOKENS.value)
    given["max_tokens"] = DEFAULT_MAX_NEW_TOKENS if max_tokens is None else max_tokens
    given |= {"logprobs": LOGPROBS.value, "stop": STOP.value or None, "structured_outputs": _structured_outputs()}
    SamplingParams.make({}, **given)  # a mistake shows before the model is loaded
    return given


def _sampler_settings() -> dict[str, Any]:
    """What --sampler or the config's says, and the flags beside it."""
    text = common.setting("generate", "sampler", SAMPLER.value)
    given = {} if text is None else parse_sampler(text)
    said = set(given)
    if said & {"entropy", *FILTERS}:
        said |= set(FILTERS)
    for flag in SETTINGS:
        overridden = SAMPLER.value is not None and flag.name in said  # a flag comes before the config
        value = flag.value if overridden else common.setting("generate", flag.name, flag.value)
        if value is None:
            continue
        if flag.name in said:
            raise RequestError(f"{flag.name}={value} contradicts the sampler {text!r}: say all of it in one of them.")
        given[flag.name] = value
    return given


def _structured_outputs() -> StructuredOutputs | None:
    form = broadcast_from_main(_given_form)  # only process 0 needs to have the files
    return StructuredOutputs(**form) if form else None


def _given_form() -> dict[str, Any]:
    form = {
        "json": _read_file(JSON_SCHEMA),
        "regex": REGEX.value,
        "choice": CHOICE.value or None,
        "grammar": _read_file(GRAMMAR),
    }
    return {name: value for name, value in form.items() if value is not None}


def _read_file(flag: flags.FlagHolder[str | None]) -> str | None:
    if flag.value is None:
        return None
    where = f"--{flag.name}={flag.value}"
    try:
        with open(flag.value, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{where}: cannot be read as UTF-8 text: {error}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise RequestError(f"{where}: has more than {MAX_FILE_BYTES} bytes; give a smaller file.")
    return text
