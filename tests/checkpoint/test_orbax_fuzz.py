"""Damaged orbax items: each is refused with CheckpointError, or gives what tensorstore makes of the same folder."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorstore as ts
from hf_models import assert_bits_equal
from hypothesis import given, strategies as st
from mutations import fuzz_settings, guarded, mutated
from orbax_items import LAYOUTS, Tensors, crc32c, random_tensors, save_item

from sharded_llama.checkpoint.orbax.source import open_orbax
from sharded_llama.errors import CheckpointError

TENSORS = random_tensors()


class Damage(NamedTuple):
    """What is to be damaged: a file, or within it a sealed block (`start`, `stop`) of a database.

    A block is a manifest or a node. It begins with its kind (4 bytes), its length (8), version and compression, and
    ends with a checksum (4): length and checksum are made right again after the damage.
    """

    layout: str
    file: str
    block: tuple[int, int] | None = None

    def apply(self, data: st.DataObject, whole: bytes) -> bytes:
        if self.block is None:
            return data.draw(mutated(whole))
        start, stop = self.block
        body = data.draw(mutated(whole[start + 12 : stop - 4]))
        if self.file != "manifest.ocdbt":  # nodes are found by offset and length
            body = body[: stop - start - 16].ljust(stop - start - 16, b"\0")
        return whole[:start] + seal(whole[start : start + 4], body) + whole[stop:]


def seal(kind: bytes, body: bytes) -> bytes:
    block = kind + (len(body) + 16).to_bytes(8, "little") + body
    return block + crc32c(block).to_bytes(4, "little")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An item in every layout, and one whose database is not compressed, so that damage gets to its fields."""
    root = tmp_path_factory.mktemp("items")
    for layout in LAYOUTS:
        save_item(root / layout, TENSORS, layout)
    save_item(root / "plain-ocdbt", TENSORS, "ocdbt")
    spec = {"driver": "ocdbt", "base": f"file://{root}/plain-ocdbt/"}
    store = ts.KvStore.open(spec).result()
    content = {key: store.read(key).result().value for key in store.list().result()}
    for old in ("d", "ocdbt.process_0"):
        shutil.rmtree(root / "plain-ocdbt" / old)
    (root / "plain-ocdbt" / "manifest.ocdbt").unlink()
    config = {"compression": None, "max_inline_value_bytes": 200, "max_decoded_node_bytes": 1500}
    store = ts.KvStore.open(spec | {"config": config}).result()
    with ts.Transaction(atomic=False) as transaction:
        for key, value in content.items():
            store.with_transaction(transaction)[key] = value
    read_by_tensorstore(root / "plain-ocdbt", True, False, list(TENSORS))  # it is whole
    return {layout: root / layout for layout in [*LAYOUTS, "plain-ocdbt"]}


def damages(items: dict[str, Path]) -> list[Damage]:
    """Every file of metadata, and every block of the database that is not compressed."""
    found = []
    for layout, item in items.items():
        for path in sorted(p for p in item.rglob("*") if p.is_file()):
            name, content = path.relative_to(item).as_posix(), path.read_bytes()
            blocks = sealed_blocks(content)
            if path.name in ("_METADATA", "_CHECKPOINT_METADATA", ".zarray", "zarr.json") or blocks:
                found.append(Damage(layout, name))
            if layout == "plain-ocdbt":
                found += [Damage(layout, name, block) for block in blocks]
    return found


def sealed_blocks(content: bytes) -> list[tuple[int, int]]:
    starts = [match.start() for match in re.finditer(rb"\x0c\xdb[\x20\x3a]", content)]
    return [(start, start + int.from_bytes(content[start + 4 : start + 12], "little")) for start in starts]


def read_by_tensorstore(item: Path, ocdbt: bool, zarr3: bool, names: list[str]) -> Tensors:
    tensors = {}
    for name in names:
        base = f"file://{item}/"
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else f"{base}{name}/"
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        tensors[name] = ts.open(spec).result().read().result()
    return tensors


def read(item: Path) -> Tensors:
    source = open_orbax(item)
    tensors = {name: np.empty(info.shape, info.dtype) for name, info in source.tensors.items()}
    for name, out in tensors.items():
        source.read(name, tuple(slice(0, n) for n in out.shape), out)
    return tensors


def try_to_read(item: Path) -> tuple[Tensors | None, str]:
    try:
        return read(item), ""
    except CheckpointError as e:
        return None, str(e)


def test_seals_are_understood(items: dict[str, Path]):
    """Sealing what is whole changes nothing: otherwise damage would never get past the checksum."""
    blocks = [damage for damage in damages(items) if damage.block]
    assert len(blocks) >= 4
    for layout, file, (start, stop) in blocks:
        content = (items[layout] / file).read_bytes()[start:stop]
        assert seal(content[:4], content[12:-4]) == content


def test_damage(items: dict[str, Path], request: pytest.FixtureRequest):
    """Damage to any file of metadata, or to two of the same item."""
    targets = damages(items)
    sizes = {layout: sum(f.stat().st_size for f in item.rglob("*") if f.is_file()) for layout, item in items.items()}
    for item in items.values():  # tensorstore starts its threads
        read(item)
    outcomes = {"refused": 0, "read": 0}

    @fuzz_settings(request)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        damage = data.draw(st.sampled_from(targets))
        item = items[damage.layout]
        file = item / damage.file
        whole = file.read_bytes()
        changed = damage.apply(data, whole)
        try:
            file.write_bytes(changed)
            with guarded(sizes[damage.layout]):
                tensors, error = try_to_read(item)
            assert tensors is not None or str(item) in error
            outcomes["refused" if tensors is None else "read"] += 1
            if tensors is not None:
                ocdbt, zarr3 = LAYOUTS[damage.layout.removeprefix("plain-")]
                expected = read_by_tensorstore(item, ocdbt, zarr3, list(tensors))
                for name, tensor in tensors.items():
                    assert_bits_equal(tensor, expected[name])
        finally:
            file.write_bytes(whole)

    run()
    assert min(outcomes.values()) > 0.02 * sum(outcomes.values()), outcomes
