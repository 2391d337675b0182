"""Damage to files, for fuzz tests of readers, and the guard under which they must read them."""

import io
import resource
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

SECONDS = 60  # far beyond the slowest example (10 s on two busy cores): this ends what hangs
SPARE_BYTES = 1 << 30
INTEGERS = (
    0,
    1,
    -1,
    2,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


class Hang(AssertionError):
    """The code under test takes too long. Not a TimeoutError, which is an OSError that a reader may catch."""


@contextmanager
def guarded(file_bytes: int) -> Iterator[None]:
    """Stops what runs too long or takes more memory than the file and 1 GiB; for the main thread."""

    def stop(signum: int, frame: object) -> None:
        raise Hang(f"still running after {SECONDS} s")

    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + file_bytes + SPARE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz_settings(request: pytest.FixtureRequest) -> settings:
    """As many examples as `--fuzz` says, the same ones in every run."""
    return settings(
        max_examples=request.config.getoption("--fuzz", 500),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated(draw: DrawFn, data: bytes) -> bytes:
    """`data` with one to three edits; each may move, drop, add or change bytes anywhere."""
    for _ in range(draw(st.integers(1, 3))):
        data = _EDITS[draw(st.integers(0, len(_EDITS) - 1))](draw, data)
    return data


def mutated_tail(data: bytes, length: int) -> SearchStrategy[bytes]:
    """Edits among the last `length` bytes only."""
    return mutated(data[-length:]).map(lambda tail: data[:-length] + tail)


@st.composite
def spliced(draw: DrawFn, first: bytes, second: bytes) -> bytes:
    """The beginning of one file and the end of another, cut at places of their own or at the same one."""
    start = draw(st.integers(0, len(first)))
    end = draw(st.one_of(st.just(min(start, len(second))), st.integers(0, len(second))))
    return first[:start] + second[end:]


def rezipped(entries: dict[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _span(draw: DrawFn, data: bytes, longest: int = 64) -> tuple[int, int]:
    start = draw(st.integers(0, len(data)))
    return start, min(len(data), start + draw(st.integers(0, longest)))


def _flip_bit(draw: DrawFn, data: bytes) -> bytes:
    bit = draw(st.integers(0, max(0, 8 * len(data) - 1)))
    return data[: bit // 8] + bytes(b ^ 1 << bit % 8 for b in data[bit // 8 : bit // 8 + 1]) + data[bit // 8 + 1 :]


def _overwrite(draw: DrawFn, data: bytes) -> bytes:
    start, _ = _span(draw, data)
    new = draw(st.binary(min_size=1, max_size=8))
    return data[:start] + new + data[start + len(new) :]


def _insert(draw: DrawFn, data: bytes) -> bytes:
    start, _ = _span(draw, data)
    return data[:start] + draw(st.binary(min_size=1, max_size=16)) + data[start:]


def _delete(draw: DrawFn, data: bytes) -> bytes:
    start, end = _span(draw, data)
    return data[:start] + data[end:]


def _truncate(draw: DrawFn, data: bytes) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def _repeat(draw: DrawFn, data: bytes) -> bytes:
    """Copies a span to another place, between what stands there or over it."""
    start, end = _span(draw, data)
    at, over = draw(st.integers(0, len(data))), draw(st.booleans())
    return data[:at] + data[start:end] + data[at + (end - start if over else 0) :]


def _swap(draw: DrawFn, data: bytes) -> bytes:
    (a, b), (c, d) = sorted([_span(draw, data), _span(draw, data)])
    c, d = max(b, c), max(b, d)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _replace_integer(draw: DrawFn, data: bytes) -> bytes:
    """Puts a special number, or one close to the old one, in the place of an integer."""
    width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
    start = draw(st.integers(0, max(0, len(data) - width)))
    old = int.from_bytes(data[start : start + width], order)
    new = draw(st.one_of(st.sampled_from(INTEGERS), st.integers(-16, 16).map(lambda change: old + change)))
    return data[:start] + (new % 256**width).to_bytes(width, order) + data[start + width :]


_EDITS = (_flip_bit, _overwrite, _insert, _delete, _truncate, _repeat, _swap, _replace_integer, _replace_integer)
