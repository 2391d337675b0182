"""What is done to a template when it is compiled: looks at the budget are put in, and some statements are refused."""

from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

LOOP, MADE, JOINED = "a loop", "a value", "a text"  # filters that no template can name


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark what the model says. It changes nothing here."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class Bounding(NodeTransformer):
    """Puts a look at the budget into loops, and where a value is made that the sandbox does not see."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        texts = [d.data for n in node.body for d in _all(n, nodes.TemplateData)]
        texts += [c.value for n in node.body for c in _all(n, nodes.Const) if isinstance(c.value, str)]
        node.iter = _filter(LOOP, node.iter, nodes.Const(sum(map(len, texts))))
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter(MADE, node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Block(self, node: nodes.Node) -> nodes.Node:
        name = type(node).__name__.lower()
        raise jinja2.TemplateSyntaxError(f"{name} is not available in chat templates", node.lineno)

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = visit_Block


def _all(node: nodes.Node, kind: type[nodes.Node]) -> Iterable[Any]:
    return [node] if isinstance(node, kind) else node.find_all(kind)


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    for arg in args:
        arg.set_lineno(node.lineno)
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)
