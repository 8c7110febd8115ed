"""Global constants of kernels stand right of their operators.

Triton 3.8's interpreter makes ``constant * tensor`` a constant that holds a tensor, which no other
function takes. Compiled code does not care, and neither did the interpreters before.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for d in ("kernels", "benchmarks") for p in (ROOT / d).rglob("*.py"))


def constants_of(tree):
    """Names that a module binds to ``tl.constexpr(...)`` at its top level, alone or in tuples."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                called = value.func if isinstance(value, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr == "constexpr":
                    yield name.id


def is_constant(node, names):
    """Whether an expression is one of `names`, or what Triton makes a constant with one."""
    if isinstance(node, ast.UnaryOp):
        return is_constant(node.operand, names)
    if isinstance(node, ast.BinOp):
        return is_constant(node.left, names)
    return isinstance(node, ast.Name) and node.id in names


def misplaced(source, names):
    """(line, text) of the operators that have a constant left of what is none."""
    for node in ast.walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.BinOp):
            pairs = [(node.left, node.right)]
        elif isinstance(node, ast.Compare):
            pairs = [(node.left, node.comparators[0])]
        for left, right in pairs:
            plain = isinstance(right, ast.Constant) or is_constant(right, names)
            if is_constant(left, names) and not plain:
                yield node.lineno, ast.unparse(node)


NAMES = {name for path in SOURCES for name in constants_of(ast.parse(path.read_text()))}


def test_the_constants_are_found():
    assert {"TWO_PI", "S0", "C2", "LOG2_E", "PRECISION"} <= NAMES


@pytest.mark.parametrize(
    "line", ["TWO_PI * x", "y + (LOG2_E - x)", "-S0 * x", "(S0 * 2) * x", "LOG2_E < x"]
)
def test_a_misplaced_constant_is_seen(line):
    assert list(misplaced(line, NAMES)) and not list(misplaced("x * TWO_PI + S0 * 2", NAMES))


def test_constants_stand_on_the_right():
    found = {path.name: list(misplaced(path.read_text(), NAMES)) for path in SOURCES}
    assert not {name: places for name, places in found.items() if places}
