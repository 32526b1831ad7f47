"""tools/oracle.py: the shipped vectors against an independent derivation, and the diagnosis."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dense_candidate
from tools.oracle import __main__ as oracle
from tools.oracle import causes, ours

GOLDEN = Path(__file__).parent / "golden"
CASES = {content["name"]: (content, tensors) for content, tensors in oracle.read(GOLDEN)}


def test_an_independent_candidate_passes():
    """Closed forms, dense matrices, brute force; in float64."""
    verdicts = {}
    for name, (content, tensors) in CASES.items():
        verdicts[name] = oracle.judge(dense_candidate, content, tensors, "float64")[2:]
    assert not {name: v for name, v in verdicts.items() if v[0] == "FAIL"}
    passed = {name for name, v in verdicts.items() if v[0] == "pass"}
    kinds = {CASES[name][0]["function"] for name in passed}
    assert kinds == set(oracle_kinds()) - {"rank_scores", "train"}


def oracle_kinds():
    return {content["function"] for content, _ in CASES.values()}


def test_the_same_export_gives_the_same_bytes(tmp_path):
    """Twice on this machine; and the shipped files: inputs to the bit, results to rounding."""
    oracle.export(tmp_path / "a")
    command = [sys.executable, "-m", "tools.oracle", "export", str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONHASHSEED": "9"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in GOLDEN.iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for content, tensors in oracle.read(tmp_path / "a"):
        shipped, shipped_tensors = CASES[content["name"]]
        assert content["arguments"] == shipped["arguments"] and content["what"] == shipped["what"]
        for key, tensor in tensors.items():
            if key.startswith("arguments/"):
                assert torch.equal(tensor, shipped_tensors[key])
        fresh = oracle.restore(content["expected"], tensors)
        error, why = oracle.error_of(fresh, oracle.restore(shipped["expected"], shipped_tensors))
        assert error < 1e-10, (content["name"], why)
    assert sum(p.stat().st_size for p in GOLDEN.iterdir()) < 5_000_000


def test_inputs_are_exact_in_float32():
    for _, tensors in CASES.values():
        for key, tensor in tensors.items():
            if key.startswith("arguments/") and tensor.is_floating_point():
                assert torch.equal(tensor.float().double(), tensor)


def test_every_known_mistake_is_noticed_and_named():
    """A mistake's result is not within tolerance, and the mistake is what is said of it."""
    named, known = set(), set()
    for name, (content, tensors) in CASES.items():
        function, expected = content["function"], oracle.restore(content["expected"], tensors)
        arguments = oracle.restore(content["arguments"], tensors, torch.float64)
        if content["expected"] == {"error": "ValueError"}:
            continue
        mistakes = list(getattr(causes, function)(**arguments))
        tolerance = content["tolerance"]["float64"]
        for cause, wrong in mistakes:
            known.add((function, cause))
            if function in oracle.ALLOCATIONS:
                error, _ = oracle.allocation_error(function, arguments, wrong, expected)
            else:
                error, _ = oracle.error_of(wrong, expected)
            if error <= tolerance:
                continue  # this mistake does not show at this point: B = 0, scale 1 …
            said = oracle.likely_cause(function, mistakes, wrong, tolerance)
            assert said, (name, cause)
            named.add((function, said))
    assert named == known  # each one shows in some case, under its own name
    assert len(known) > 80


WRONG = """
from tools.oracle.ours import *
from tools.oracle import causes, ours

def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    return ours.lora_forward(
        x, weight, bias, lora_A, lora_B, lora_alpha * len(lora_A), transposed
    )

def scores(proxy, **rest):
    found = ours.scores(proxy, **rest)
    return {n: 2 * v for n, v in found.items()} if proxy == "fisher" else found

def within_budget(scores, costs, budget):
    return set(scores)

def merge(**_):
    raise RuntimeError("no such thing")

del delta_lora
"""


def test_command_line_on_a_wrong_candidate(tmp_path, capsys):
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    assert oracle.main(["check", str(GOLDEN), "--candidate", str(path)]) == 1
    out = capsys.readouterr().out
    rows = {tuple(line.split()[:2]): line for line in out.splitlines()}
    alpha = rows["forward-linear", "float64"]
    assert alpha.endswith("FAIL  likely: scale lora_alpha instead of lora_alpha / r")
    assert "likely: without the 1/2" in rows["scores-fisher-b-lora", "float64"]
    assert "parameters, the budget is" in rows["budget-1-sizes-0.1", "float64"]
    assert rows["merge-linear", "float32"].endswith("FAIL  RuntimeError: no such thing")
    assert rows["delta-start3", "float64"].endswith("-  not offered")
    assert rows["backward-square", "float32"].endswith("pass")


def test_command_line_on_our_own_and_on_nonsense(tmp_path, capsys):
    candidate = Path(ours.__file__)
    assert oracle.main(["check", str(GOLDEN), "--candidate", str(candidate)]) == 0
    total = sum(len(content["dtypes"]) for content, _ in CASES.values())
    assert f"{total} pass, 0 fail, 0 not offered" in capsys.readouterr().out
    assert len(oracle_kinds()) == 10
    empty = tmp_path / "empty.py"
    empty.write_text("")
    assert oracle.main(["check", str(GOLDEN), "--candidate", str(empty)]) == 1
    capsys.readouterr()
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    for folder, candidate, message in (
        (GOLDEN, broken, "cannot be imported"),
        (GOLDEN, tmp_path / "none.py", "is no Python file"),
        (tmp_path, Path(ours.__file__), "holds no cases"),
    ):
        assert oracle.main(["check", str(folder), "--candidate", str(candidate)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "x.json").write_text(json.dumps({"function": "merge"}))
    assert oracle.main(["check", str(tmp_path), "--candidate", str(candidate)]) == 2
    assert "is not a case of the oracle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        (torch.ones(2), torch.tensor([1.0, 2.0]), 0.5),
        ([1.0, 2.0], torch.tensor([1.0, 2.0]), 0.0),
        ({"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 4.0}, 0.25),
        ({"a": 1.0}, {"a": 1.0, "b": 4.0}, math.inf),
        (torch.ones(3), torch.ones(2), math.inf),
        (torch.tensor([math.nan]), torch.ones(1), math.inf),
        ("text", torch.ones(1), math.inf),
        (None, {"a": 1.0}, math.inf),
        ([["x"], ["y"]], [["x"], ["z"]], math.inf),
        ([], [], 0.0),
    ],
)
def test_errors_between_results(got, expected, error):
    assert oracle.error_of(got, expected)[0] == error
