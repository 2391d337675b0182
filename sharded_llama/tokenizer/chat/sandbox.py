"""The environment that a chat template runs in.

A template is a program of somebody else: it runs in jinja2's sandbox and has a budget. A loop's every step, every
attribute, call, operator and filter spends some of it, by the size of the result; values that grow beyond a bound are
refused where they are made, before they take memory where that can be told. So what happens between two looks at the
budget is bounded, and so is the whole. What remains: in every request a template can use all of MAX_CPU_SECONDS
(see `budget`), up to four times as one request is rendered up to four times, and a few hundred megabytes.
"""

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ...errors import RequestError
from .budget import MAX_WIDTH, Budget, allow, allow_number
from .filters import FILTERS, allow_replacing, check_format, words
from .syntax import JOINED, LOOP, MADE, Generation

# Names of what a template may call; no caller may give them another meaning.
FUNCTIONS = ("range", "cycler", "joiner", "dict", "namespace", "raise_exception", "strftime_now")

# Methods of values. Those of other types are refused, but for what jinja2 itself gives to templates.
METHODS: dict[type, frozenset[str]] = {
    str: words(
        "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
        "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    dict: words("copy get items keys values"),
    list: words("copy count index"),
    tuple: words("count index"),
}


class Refusal(Exception):
    """What a template says by `raise_exception`."""


class _Names(Namespace):
    """jinja2's namespace, without names that mean something to Python, and without its content when written out."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a name may be `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} is not a name for a namespace")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering: what transformers offers to templates, each use of it out of the budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, budget: Budget, now: datetime | None = None, marks: Mapping[str, str] | None = None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=budget.checked,
            extensions=[jinja2.ext.loopcontrols, Generation],
        )
        self._budget = budget
        self._now = now
        self._escaped = {json.dumps(mark)[1:-1]: mark for mark in (marks or {}).values()}
        filters = {**FILTERS, "join": self._join, "tojson": self._tojson}
        self.filters = {name: self._bounded(function) for name, function in filters.items()}
        self.filters |= {LOOP: self._loop, MADE: budget.checked, JOINED: functools.partial(budget.joined, "")}
        self.globals = {name: self.globals[name] for name in ("range", "cycler", "joiner")} | {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Names,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
        }

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._budget.spend()
        item = super().getitem(obj, argument)
        return self._budget.checked(item) if isinstance(argument, slice) else item

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 gives an undefined value, which is written out as nothing.
        raise jinja2.exceptions.SecurityError(f"chat templates cannot have {attribute} of a {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._budget.spend()
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                    allow(len(many) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            allow_number(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            check_format(left, right)
        return self._budget.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # a name may be `self`
        budget = __self._budget
        for value in (*args, *kwargs.values()):
            budget.checked(value)
        if isinstance(__obj, types.BuiltinMethodType):
            _check_method(__obj, args, kwargs)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            # A width may be a field of its own, whose number is not known here.
            if re.search(r":[^{}:]*(\{|\d{4})", template):
                raise RequestError("the chat template formats to a width that is too large, or not known.")
            allow(len(template) + template.count("{") * self._budget.size([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return bounded

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._budget.spend()
            return self._budget.checked(function(*args, **kwargs))

        call.__dict__.update(getattr(function, "__dict__", {}))  # jinja2's note of what the filter wants to be passed
        return call

    def _loop(self, items: Iterable[Any], text: int) -> Iterator[Any]:
        """`text`: characters of the loop's body."""
        for item in items:
            self._budget.spend(text)
            yield item

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        values = value if attribute is None else map(make_attrgetter(self, attribute), value)
        return self._budget.joined(str(d), values)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        if (len(indent) if isinstance(indent, str) else indent or 0) > 16:
            raise RequestError("the chat template indents JSON by more than 16 characters.")
        for separator in separators or ():
            allow(len(separator) * MAX_WIDTH)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators and tuple(separators), sort_keys=sort_keys
        )
        text = self._budget.joined("", encoder.iterencode(value))
        # A mark stands for a character that is not escaped.
        return re.sub(r"\\u[ef][0-9a-f]{3}", lambda m: self._escaped.get(m[0], m[0]), text) if ensure_ascii else text

    def _strftime_now(self, format: str) -> str:
        if not isinstance(format, str) or len(format) > 100:
            raise RequestError("the chat template asks for the date in a format of more than 100 characters.")
        return (datetime.now() if self._now is None else self._now).strftime(format)


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message)[:500])


def _check_method(method: types.BuiltinMethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises for methods that templates do not have, and before those that would make too large a value."""
    owner, name = method.__self__, method.__name__
    if not any(isinstance(owner, kind) and name in names for kind, names in METHODS.items()):
        raise jinja2.exceptions.SecurityError(f"chat templates cannot call {name} of a {type(owner).__name__}")
    if name in ("center", "expandtabs", "ljust", "rjust", "zfill"):
        for width in (*args, *kwargs.values()):
            if isinstance(width, int) and width > MAX_WIDTH:
                raise RequestError(f"the chat template pads to more than {MAX_WIDTH} characters.")
        allow(len(owner) * (MAX_WIDTH if name == "expandtabs" and "\t" in owner else 1))
    elif name == "replace" and len(args) >= 2:
        allow_replacing(owner, *args[:2])
    elif name == "join" and args and isinstance(args[0], (str, list, tuple, dict)):
        allow(len(owner) * len(args[0]))
    elif name == "join":
        raise RequestError("the chat template joins what is no list; it would have to make one by the filter `list`.")
