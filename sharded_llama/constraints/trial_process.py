"""Compiles grammars for `trial.py`, in a process that can be stopped. A script: it imports nothing of the package.

Arguments: the library's limits as JSON, bytes of memory, tokens of an answer. A definition as JSON in each line of the
input; a line of the output for each when it is done, whether it can be used or not.
"""

import json
import resource
import signal
import sys

LONGEST = 60  # seconds


def main() -> None:
    limits, n_bytes, n_tokens = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    for line in sys.stdin:  # ends with the process that writes it
        signal.alarm(LONGEST)  # nobody may be left to stop it
        try:
            matcher = llguidance.LLMatcher(
                tokenizer, json.loads(line), log_level=0, limits=llguidance.LLParserLimits(**limits)
            )
            for _ in range(n_tokens):
                mask = int.from_bytes(matcher.compute_bitmask(), "little")
                token = (mask & -mask).bit_length() - 1
                if token < 0 or matcher.is_stopped() or not matcher.consume_token(token):
                    break
        except BaseException as error:
            print(f"failed: {type(error).__name__}", file=sys.stderr)
        signal.alarm(0)
        print("done", flush=True)


if __name__ == "__main__":
    main()
