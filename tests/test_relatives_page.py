"""docs/relatives.md: every method has its row, with its file, and trains what the row says."""

import re
from pathlib import Path

import pytest

import lora
import tiny
from relatives import METHODS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "relatives.md"
WHERE = {"condlora": ("q_proj",)} | dict.fromkeys(("cora", "cora_trained"), lora.LINEARS[:3])


def rows():
    """{method: its cells} of the tables that have a column for the file."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        if line.startswith("|") and names and cells[-1].startswith("["):
            assert not set(names) & set(found), f"{names} has two rows"
            found |= dict.fromkeys(names, cells)
    return found


def test_every_method_has_a_row_with_its_file():
    methods = {name: method for kind in METHODS.values() for name, method in kind.items()}
    assert set(rows()) == {*methods, "static", "dynamic"}
    for name, method in methods.items():
        file = method.__module__.replace(".", "/") + ".py"
        assert rows()[name][-1].endswith(f"](../{file})"), name


def value(formula, **numbers):
    """Of a formula that multiplies by writing side by side: r (m + n)."""
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), numbers)


@pytest.mark.parametrize("name", METHODS["adapter"])
def test_what_a_row_says_trains_does(name):
    """m = 20, n = 12 where the method takes it, r = 5, three blocks."""
    model = tiny.model("bert")
    places = WHERE.get(name, ("fc1",))
    layers = lora.inject(model, places, r=5, adapter=METHODS["adapter"][name])
    lora.mark_trainable(model)
    counts = lora.count_trainable(model)
    m, n = (20, 12) if places == ("fc1",) else (12, 12)
    numbers = {"m": m, "n": n, "r": 5, "u": 1, "x_A": 4, "x_B": 4}
    formula = rows()[name][3]
    once, shared, own = formula.partition(" once a place")
    own = own.removeprefix(", and ").removesuffix(" a module")
    expected = value(once, **numbers) * (len(places) if shared else len(layers))
    expected += value(own or "0", **numbers) * len(layers)
    assert sum(counts[module] for module in layers) == expected
