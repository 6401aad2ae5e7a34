"""Habits of the tests: every assertion can fail, and every architecture has its own test file."""

import ast

import pytest
from conftest import PROJECT

FILES = sorted((PROJECT / "tests").glob("*.py"))
VALUES = (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Lambda, ast.JoinedStr, ast.GeneratorExp)


def is_condition(test: ast.expr) -> bool:
    """Return False for a literal, which is always true, and for `a == b if c else d` whose `d` compares nothing."""
    if isinstance(test, ast.BoolOp):
        return all(is_condition(value) for value in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return is_condition(test.operand)
    if isinstance(test, ast.IfExp):
        return all(isinstance(branch, (ast.Compare, ast.UnaryOp)) for branch in (test.body, test.orelse))
    return not isinstance(test, VALUES)


def never_fail(code: str) -> list[int]:
    """List the lines whose assertion cannot fail."""
    asserts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    return [node.lineno for node in asserts if not is_condition(node.test)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_assertion_can_fail(file):
    assert never_fail(file.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "assert a == 1 if b else (2, 3)",
        "assert (a, 'why')",
        "assert 'text'",
        "assert a and [b]",
        "assert (x for x in y)",
    ],
)
def test_the_rule_finds_assertions_that_cannot_fail(code):
    assert never_fail(code) == [1]


@pytest.mark.parametrize("code", ["assert a == (1 if b else 2)", "assert (a == 1) is b, 'why'", "assert a and b < c"])
def test_the_rule_allows_conditions(code):
    assert never_fail(code) == []


@pytest.mark.parametrize(
    "architecture", sorted((PROJECT / "segmentation/architectures").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_every_architecture_has_its_test_file(architecture):
    assert PROJECT / f"tests/test_{architecture.stem}.py" in FILES
