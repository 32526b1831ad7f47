"""Drawing mutants: a made-up source, all of whose edits are written out here."""

import ast
from pathlib import Path

import pytest

import drawn_mutants

SOURCE = '''"""Head: 1 + 1."""
import math


class Box:
    """A box."""

    size: int = 3

    def grow(self, by: int | None = None, *, kind="big", flag=True) -> int | None:
        """It grows by 2 < 3."""
        if not flag and by is None:  # a - b
            raise ValueError(f"by is {by + 1}" + "no" * 2)
        é = max(1, by) + (by) - math.atan2(by, (2.5))  # é is two bytes
        é += -0.0
        return é
'''
EDITS = [  # (line, old, new, what, where), of each line from left to right
    (8, "3", "4", "number", "Box"),
    (10, "None", "0", "default", "Box.grow"),
    (10, '"big"', "None", "default", "Box.grow"),
    (10, "True", "False", "truth value", "Box.grow"),
    (
        12,
        "if not flag and by is None:  # a - b\n"
        '            raise ValueError(f"by is {by + 1}" + "no" * 2)',
        "pass",
        "statement",
        "Box.grow",
    ),
    (12, "not ", "", "operator", "Box.grow"),
    (12, "and", "or", "operator", "Box.grow"),
    (12, "is", "is not", "operator", "Box.grow"),
    (13, 'raise ValueError(f"by is {by + 1}" + "no" * 2)', "pass", "statement", "Box.grow"),
    (14, "é = max(1, by) + (by) - math.atan2(by, (2.5))", "pass", "statement", "Box.grow"),
    (14, "1", "2", "number", "Box.grow"),
    (14, "+", "-", "operator", "Box.grow"),
    (14, "-", "+", "operator", "Box.grow"),
    (14, "by, (2.5", "2.5, (by", "neighbouring arguments", "Box.grow"),
    (14, "2.5", "5.0", "number", "Box.grow"),
    (15, "é += -0.0", "pass", "statement", "Box.grow"),
    (15, "+", "-", "operator", "Box.grow"),
    (15, "-", "", "operator", "Box.grow"),
    (15, "0.0", "1.0", "number", "Box.grow"),
    (16, "return é", "pass", "statement", "Box.grow"),
]


def test_every_edit_of_a_source_and_no_other():
    found = [(m.line, m.old, m.new, m.what, m.where) for m in drawn_mutants.draw(SOURCE)]
    assert sorted(found) == sorted(EDITS)


def test_an_edit_changes_its_place_alone():
    mutant = next(m for m in drawn_mutants.draw(SOURCE) if m.old == "by, (2.5")
    edited = mutant.apply(SOURCE)
    assert edited.replace("math.atan2(2.5, (by))", "math.atan2(by, (2.5))") == SOURCE
    assert edited != SOURCE
    before, after = mutant.lines(SOURCE)
    assert before == "é = max(1, by) + (by) - math.atan2(by, (2.5)) # é is two bytes"
    assert after == "é = max(1, by) + (by) - math.atan2(2.5, (by)) # é is two bytes"


def test_a_deleted_statement_is_shown_by_its_first_line():
    mutant = next(m for m in drawn_mutants.draw(SOURCE) if m.old.startswith("if not flag"))
    assert mutant.lines(SOURCE) == ("if not flag and by is None:  # a - b", "pass")


@pytest.mark.parametrize(
    "expression, edited",
    [
        ("a // b", "a / b"),
        ("a % b", "a * b"),
        ("a ** b", "a * b"),
        ("a @ b", "a * b"),
        ("a < b", "a <= b"),
        ("a >= b", "a > b"),
        ("a == b", "a != b"),
        ("a not in b", "a in b"),
        ("a in b", "a not in b"),
        ("a is not b", "a is b"),
        ("a or b", "a and b"),
        ("~a", "a"),
        ("'%s' % a", None),
        ("f(*a, b)", None),
        ("min(a, b)", None),
        ("x.transpose(a, b)", None),
        ("zip(a, a, strict=True)", None),
        ("f(strict=True)", "f(strict=False)"),
        ("named(a, 'b', 'c')", "named('b', a, 'c')"),
        ("f(a, a)", None),
    ],
)
def test_one_edit_of_an_expression(expression, edited):
    source = f"x = {expression}\n"
    found = [m.apply(source) for m in drawn_mutants.draw(source) if m.what != "statement"]
    assert found == ([f"x = {edited}\n"] if edited else [])


def test_every_edit_of_the_root_files_is_python_and_another_program():
    for path in Path(drawn_mutants.__file__).parents[1].glob("*.py"):
        source = path.read_text()
        tree = ast.dump(ast.parse(source))
        found = drawn_mutants.draw(source)
        assert len({(m.start, m.old, m.new) for m in found}) == len(found)
        for mutant in found[::20]:
            assert ast.dump(ast.parse(mutant.apply(source))) != tree


def test_every_survivor_that_is_listed_can_still_be_drawn():
    root = Path(drawn_mutants.__file__).parents[1]
    for key in drawn_mutants.listed((root / "tests" / "survivors.txt").read_text()):
        source = (root / key[0]).read_text()
        drawn = {(m.where, *m.lines(source)) for m in drawn_mutants.draw(source)}
        assert key[1:] in drawn, f"{key} is drawn no more: take it off the list"


def test_the_list_of_survivors_is_read():
    text = "Words.\nMore words.\n\na.py Box.grow\n- f(a, b)\n+ f(b, a)\n= f is symmetric\n"
    assert drawn_mutants.listed(text) == {
        ("a.py", "Box.grow", "f(a, b)", "f(b, a)"): "f is symmetric"
    }
    for wrong in (text.replace("= f is symmetric\n", ""), text.replace("f is symmetric", "")):
        with pytest.raises(ValueError, match=r"a\.py Box\.grow"):
            drawn_mutants.listed(wrong)
