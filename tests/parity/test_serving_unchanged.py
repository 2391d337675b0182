"""The probes cost serving nothing: without them in the source, the same programs are compiled."""

import ast
import importlib
import importlib.util
import re
import sys

import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.engine import steps as steps_module
from sharded_llama.engine.options import EngineOptions, sizes_of
from sharded_llama.engine.runner import Runner
from sharded_llama.engine.steps import StepShape
from sharded_llama.mesh import make_mesh
from sharded_llama.weights import abstract_weights

CONFIG = LlamaConfig(
    dim=48,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    head_dim=6,
    ffn_dim=50,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="bfloat16",
)


class WithoutProbes(ast.NodeTransformer):
    """Replaces probe("name", x) by x, and imports of the layers by those of the stripped ones."""

    def __init__(self):
        self.removed = []

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "probe":
            name, value = node.args
            self.removed.append(name.value)
            return value
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.module == "layers":
            node.module = "layers_without_probes"
        return node


@pytest.fixture
def stripped(monkeypatch):
    """`sharded_llama.model` made of sources without probes, and the names of those that were there."""
    removed = []
    for name in ("layers", "model"):
        source = importlib.util.find_spec(f"sharded_llama.{name}")
        transformer = WithoutProbes()
        tree = ast.fix_missing_locations(transformer.visit(ast.parse(source.loader.get_source(source.name))))
        removed += transformer.removed
        spec = importlib.util.spec_from_loader(f"sharded_llama.{name}_without_probes", loader=None)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        exec(compile(tree, source.origin, "exec"), module.__dict__)
    return module, removed


def program(executable) -> str:
    """The compiled program without the places in the source that it came from."""
    text = re.sub(r", metadata=\{[^}]*\}", "", executable.as_text())
    assert "fusion" in text or "dot" in text
    return text[text.index("\n\n%") if "\n\n%" in text else 0 :]


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)], ids=str)
def test_the_compiled_steps_are_those_of_a_model_without_probes(stripped, monkeypatch, mesh_shape):
    model, removed = stripped
    assert {"attention_norm", "q_rotated", "attn_wo", "gate", "ffn_residual", "norm"} <= set(removed)

    def programs() -> list[str]:
        mesh = make_mesh(*mesh_shape)
        options = EngineOptions(max_num_seqs=4 * mesh_shape[0], max_num_batched_tokens=36 * mesh_shape[0])
        runner = Runner(
            CONFIG,
            mesh,
            abstract_weights(CONFIG, mesh),
            backend="blockwise",
            sizes=sizes_of(options, mesh),
            n_pages=8,
            table_width=4,
            kv_dtype="auto",
        )
        decode, mixed = StepShape(4, 0, 1), StepShape(4, 2, 16, 4)
        assert {decode, mixed} <= set(runner.sizes.shapes)
        return [program(runner._forward(decode)), program(runner._forward(mixed))]

    served = programs()
    used = []
    monkeypatch.setattr(steps_module, "xfmr_step", lambda *args, **kw: used.append(1) or model.xfmr_step(*args, **kw))
    assert programs() == served
    assert len(used) == 2
