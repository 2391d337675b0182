"""The filters of chat templates. Those that could make much of little look first at what they would make."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2.filters import FILTERS as JINJA2_FILTERS, make_attrgetter
from markupsafe import escape

from ...errors import RequestError
from .budget import MAX_WIDTH, allow


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Of jinja2's filters, those with results of about the size of their input.
PLAIN_FILTERS = words(
    "abs attr capitalize count d default dictsort first float groupby int items last length list lower map max min "
    "reject rejectattr reverse select selectattr sort string title trim truncate unique upper urlencode wordcount"
)


def allow_replacing(text: str, old: Any, new: Any) -> None:
    """Raises RequestError when `text` with `new` for `old` would be too long."""
    if isinstance(old, str) and isinstance(new, str):
        allow(len(text) + text.count(old) * len(new))


def check_format(template: str, values: Any) -> None:
    """Raises RequestError for a format of printf's when what it makes may be too long."""
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", template):
        raise RequestError("the chat template formats to a width that is too large, or not known.")
    values = values if isinstance(values, (tuple, list)) else [values]
    allow(len(template) + sum(len(str(value)) for value in values) * max(1, template.count("%(")))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    template = str(value)
    check_format(template, [*args, *kwargs.values()])
    return template % (kwargs or args)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else width
    if size > MAX_WIDTH:
        raise RequestError(f"the chat template indents by more than {MAX_WIDTH} characters.")
    allow(len(str(s)) + size * (len(str(s).splitlines()) + 1))
    return JINJA2_FILTERS["indent"](str(s), width, first, blank)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    allow_replacing(s, old, new)
    return s.replace(old, new, -1 if count is None else count)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 100:
        raise RequestError("the chat template rounds to more than 100 digits.")
    return JINJA2_FILTERS["round"](value, precision, method)


def _escape(value: Any) -> str:
    return str(escape(str(value)))


@jinja2.pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> float:
    # Lists could be added up as well, in a time that is quadratic.
    if not isinstance(start, (int, float)):
        raise RequestError("the chat template sums up what is no number.")
    return sum(iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable), start)


# Without `join` and `tojson`, which need the budget; see `sandbox`.
FILTERS: Mapping[str, Callable[..., Any]] = {name: JINJA2_FILTERS[name] for name in PLAIN_FILTERS} | {
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "replace": _replace,
    "round": _round,
    "safe": str,
    "sum": _sum,
}
