"""docs/exercises.md and docs/exercises.py: fourteen functions, and the commands that grade them."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

import dense_candidate
from tools.oracle import check, ours
from tools.oracle.__main__ import GOLDEN, main

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "exercises.md").read_text()
BLANK = DOCS / "exercises.py"
COMMANDS = re.findall(r"^    python -m tools\.oracle (check --only (\w+) .*)$", PAGE, re.MULTILINE)
NAMES = list(dict.fromkeys(name for _, name in COMMANDS))


def headings():
    """{number: the exercise's part of the page}."""
    parts = re.split(r"^### (\d+)\. ", PAGE, flags=re.MULTILINE)[1:]
    return {int(number): text for number, text in zip(parts[::2], parts[1::2], strict=True)}


def test_there_are_fourteen_in_the_order_of_the_page():
    blank = [node for node in ast.parse(BLANK.read_text()).body if hasattr(node, "name")]
    assert [node.name for node in blank] == NAMES and len(NAMES) == 14
    assert list(headings()) == list(range(1, 15))


@pytest.mark.parametrize("number", range(1, 15))
def test_each_has_idea_signature_hint_and_command(number):
    text, name = headings()[number], NAMES[number - 1]
    signature = f"{name}{inspect.signature(getattr(ours, name))}"
    blank = check.load_candidate(BLANK)
    assert f"{name}{inspect.signature(getattr(blank, name))}" == signature
    assert getattr(blank, name).__doc__.startswith(f"{number}. ")
    idea, rest = text.split(f"\n    {signature}", 1)
    assert len(idea.strip().splitlines()) <= 6  # title, empty line, three or four lines
    assert rest.count("*Hint:*") == 1
    assert f"python -m tools.oracle check --only {name} --candidate exercises.py" in rest


@pytest.mark.parametrize("name", NAMES)
def test_our_own_modules_solve_it_and_the_blank_file_offers_nothing(name, tmp_path, capsys):
    """By the page's own command, with its file where the page has it copied to."""
    command = next(text for text, of in COMMANDS if of == name)
    arguments = shlex.split(command)
    blank = tmp_path / arguments[-1]
    blank.write_bytes(BLANK.read_bytes())
    assert main([*arguments[:-1], str(blank)]) == 3
    out = capsys.readouterr().out.splitlines()
    assert all(line.endswith("-  not offered") for line in out[1:-1])
    assert out[-1].startswith("0 pass, 0 fail, ")
    assert main([*arguments[:-1], ours.__file__]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" pass, 0 fail, 0 not offered")


@pytest.mark.parametrize("name", NAMES)
def test_a_second_solution_without_our_modules_passes(name):
    rows = check.check(GOLDEN, dense_candidate, name)
    assert {row.verdict for row in rows if row.dtype == "float64"} == {"pass"}


def test_the_examples_of_output_are_what_is_printed(tmp_path):
    """The three lines on the page: nothing offered, a mistake, a solution."""
    text = (
        "from tools.oracle import ours\n"
        "def lora_forward(lora_A, lora_alpha, **rest):\n"
        "    return ours.lora_forward(lora_A=lora_A, lora_alpha=lora_alpha * len(lora_A), **rest)\n"
    )
    path = tmp_path / "wrong.py"
    path.write_text(text)
    page = [re.sub(r"[\d.]+e-1\d ", "(noise) ", line) for line in PAGE.splitlines()]
    for candidate in (check.load_candidate(BLANK), check.load_candidate(path), ours):
        head, first, *_ = check.table(check.check(GOLDEN, candidate, "forward-linear"))
        assert f"    {head}" in page
        assert "    " + re.sub(r"[\d.]+e[-+]\d+(?=    1e-09  pass)", "(noise)", first) in page
