"""The command `sharded-llama NAME --flag=value ...`: lists the launchers, shows the flags of one, or runs it."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

# How a launcher is called: from a checkout this is the package `launch`, installed it is sharded_llama.launch.
COMMAND = "python -m launch." if __package__ == "launch" else "sharded-llama "
HELP = ("--help", "--helpshort", "-h")


def launchers() -> dict[str, str]:
    """Name and docstring of each module beside this one that has a `cli` function. Imports none of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "cli" for node in module.body):
            found[path.stem] = ast.get_docstring(module) or ""
    return found


def overview(docs: dict[str, str]) -> str:
    width = max(map(len, docs))
    lines = [f"  {name:{width}}  {doc.partition(chr(10))[0]}" for name, doc in docs.items()]
    return "\n".join([f"Usage: {COMMAND}NAME --flag=value ...", "", *lines, "", f"{COMMAND}NAME --help: its flags."])


def launcher_help(name: str, doc: str) -> str:
    """The launcher's docstring and its flags."""
    from absl import flags  # with the launcher, this takes seconds

    module = importlib.import_module(f".{name}", __package__)
    return "\n\n".join([doc.replace("python -m launch.", COMMAND), flags.FLAGS.module_help(module).strip("\n")])


def main() -> None:
    docs = launchers()
    name, *args = sys.argv[1:] or ["--help"]
    if name in HELP:
        print(overview(docs))
    elif name not in docs:
        close = difflib.get_close_matches(name, docs, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"error: there is no launcher {name!r}.{hint}\n{overview(docs)}", file=sys.stderr)
        sys.exit(1)
    elif set(args) & set(HELP):
        print(launcher_help(name, docs[name]))
    else:
        sys.argv = [COMMAND + name, *args]
        importlib.import_module(f".{name}", __package__).cli()
