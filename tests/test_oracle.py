"""tools/oracle: the cases against independent derivations, and the diagnosis of mistakes."""

import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dense_candidate
from tools.oracle import (
    causes,
    causes_adapters,
    causes_rules,
    check,
    golden,
    ours,
    ours_adapters,
    ours_rules,
    wrong_runs,
)
from tools.oracle.__main__ import GOLDEN, main

CASES = {content["name"]: (content, tensors) for content, tensors in golden.read(GOLDEN)}
FUNCTIONS = list(dict.fromkeys(content["function"] for content, _ in CASES.values()))


RELATIVES = [f for f in FUNCTIONS if hasattr(ours_adapters, f) or hasattr(ours_rules, f)]


def right_answer(name):
    """(arguments in float64, what a right candidate returns)."""
    content, tensors = CASES[name]
    arguments = golden.restore(content["arguments"], tensors, torch.float64)
    return arguments, golden.restore(content["expected"], tensors)


# ---------------------------------------------------------------------------------------- the cases


def test_an_independent_candidate_passes():
    """Closed forms, dense matrices, brute force; in float64."""
    rows = [check.judge(dense_candidate, *case, "float64") for case in CASES.values()]
    assert not {row.content["name"]: row.reason for row in rows if row.verdict == "FAIL"}
    assert {row.function for row in rows if row.verdict == "pass"} == set(FUNCTIONS) - {"train"}


@pytest.mark.parametrize("case", ["run", "short_run"])
def test_runs_equal_a_loop_written_out(case):
    """AdamW, scores and the change of W without torch.optim, proxies.py and delta_lora.py."""
    arguments, expected = right_answer(case)
    settings, batches = arguments.pop("settings"), arguments.pop("batches")
    if case == "run":
        model, paths = ours.build(**arguments)
        names = dict(paths)
    else:
        model = ours.Network(**arguments)
        names = {name: i for i, name in enumerate(ours.lora.adapters(model))}
    losses, on = wrong_runs.run(wrong_runs.NO_MISTAKE, model, batches, settings)
    assert check.error_of(losses, expected["losses"])[0] < 1e-12
    assert [sorted(names[n] for n in chosen) for chosen in on] == expected["on"]
    for name, layer in ours.lora.adapters(model).items():
        pair = expected["adapters"][names[name]]
        assert check.error_of(ours.pair_of(layer), pair)[0] < 1e-11
        if isinstance(layer.base, torch.nn.Linear):
            weight = expected["weights"][names[name]]
            assert check.error_of(layer.base.weight, weight)[0] < 1e-11


@pytest.mark.parametrize("case", ["run", "short_run"])
def test_in_each_run_something_goes_off_and_returns(case):
    arguments, expected = right_answer(case)
    on = [set(decision) for decision in expected["on"]]
    everything = set.union(*on)
    assert all(decision != everything for decision in on)
    returns = [
        name
        for name in everything
        for i in range(1, len(on))
        if name in on[i] and name not in on[i - 1] and any(name in d for d in on[: i - 1])
    ]
    assert returns
    settings = arguments["settings"]
    assert settings["adamw"]["weight_decay"] and settings["delta_ratio"]
    assert len({len(batch["labels"]) for batch in arguments["batches"]}) > 1


def test_the_same_export_gives_the_same_bytes(tmp_path):
    """Twice on this machine; and the shipped files: inputs to the bit, results to rounding."""
    command = [sys.executable, "-m", "tools.oracle", "export", str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONHASHSEED": "9"}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    golden.export(tmp_path / "a")
    assert other.wait() == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in GOLDEN.iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for content, tensors in golden.read(tmp_path / "a"):
        shipped, shipped_tensors = CASES[content["name"]]
        assert content["arguments"] == shipped["arguments"] and content["what"] == shipped["what"]
        for key, tensor in tensors.items():
            if key.startswith("arguments/"):
                assert torch.equal(tensor, shipped_tensors[key])
        fresh = golden.restore(content["expected"], tensors)
        error, why = check.error_of(fresh, golden.restore(shipped["expected"], shipped_tensors))
        assert error < 1e-10, (content["name"], why)
    assert sum(p.stat().st_size for p in GOLDEN.iterdir()) < 5_000_000


def test_the_page_counts_them():
    assert f"holds {len(CASES)} small cases" in (GOLDEN.parents[1] / "docs/oracle.md").read_text()


def test_inputs_are_exact_in_float32():
    for _, tensors in CASES.values():
        for key, tensor in tensors.items():
            if key.startswith("arguments/") and tensor.is_floating_point():
                assert torch.equal(tensor.float().double(), tensor)


def test_there_are_negative_scores():
    """Choosing by |score| must not pass, neither by fraction nor by budget."""
    for case in ("keep-negative-together", "keep-negative-apart", "budget-negative"):
        scores = right_answer(case)[0]["scores"]
        assert min(scores.values()) < 0 < max(scores.values())


# ------------------------------------------------------------------------------------- the mistakes


def pretend(rows, cause, outcomes):
    """What a candidate with this mistake alone returns in each case, judged; the rows that fail."""
    for row in rows:
        expected, right, wrong = outcomes[row.content["name"]]
        row.outcome = wrong.get(cause, right)
        if isinstance(row.outcome, Exception):
            row.error, row.reason = math.inf, str(row.outcome)
        else:
            answer = (row.function, row.content["arguments"], row.outcome, expected)
            row.error, row.reason = check.result_error(*answer)
        row.verdict = "pass" if row.error <= row.tolerance else "FAIL"
    return [row for row in rows if row.verdict == "FAIL"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_mistake_alone_is_noticed_and_named(function):
    """It fails in some case, and wherever it fails its own name is said, and no other."""
    rows, outcomes = [], {}
    for name, (content, tensors) in CASES.items():
        at_zero = name.startswith(("scores-", "ranks-")) and "-b0" in name
        at_zero = at_zero and name != "scores-grad_norm-b0-lora"
        wants_error = content["expected"] == {"error": "ValueError"}
        if content["function"] != function or wants_error or at_zero:  # at B = 0 nearly all are 0
            continue
        row = check.Row(content, tensors, "float64")
        right = getattr(ours, function)(**row.arguments())
        made = {cause: check.attempt(wrong) for cause, wrong in row.mistakes().items()}
        row.mistakes().update(made)
        outcomes[name] = golden.restore(content["expected"], tensors), right, made
        rows.append(row)
    known = dict.fromkeys(cause for row in rows for cause in row.mistakes())
    assert len(known) >= 11
    for cause in known:
        failures = pretend(rows, cause, outcomes)
        assert failures, f"{cause}: no case notices"
        check.diagnose(rows)
        for row in failures:
            raised = f" ({row.outcome})" if isinstance(row.outcome, Exception) else ""
            assert row.reason == f"likely: {cause}{raised}", (row.content["name"], cause)


@pytest.mark.parametrize("function", RELATIVES)
def test_each_case_of_the_relatives_matters(function):
    """It shows some mistake as no other case of its function does: at all, or in shape alone."""
    shown = {}
    for name, (content, tensors) in CASES.items():
        if content["function"] == function:
            row, shown[name] = check.Row(content, tensors, "float64"), set()
            expected = golden.restore(content["expected"], tensors)
            for cause, wrong in row.mistakes().items():
                answer = function, row.arguments(), check.attempt(wrong), expected
                error, _ = check.result_error(*answer)
                if error > row.tolerance:
                    shown[name].add((cause, error < math.inf))
    shown.pop("riemannian_step-turned", None)  # for test_a_riemannian_step_does_not_see_the_basis
    for name, own in shown.items():
        assert own.difference(*(other for n, other in shown.items() if n != name)), name


def test_a_riemannian_step_does_not_see_the_basis():
    """Of (A, B) and (R A, B R^-1) the product after the step is one; the factors are not."""
    steps = [right_answer(f"riemannian_step{end}") for end in ("", "-turned")]
    (given, one), (turned, other) = steps
    before = [a["lora_B"] @ a["lora_A"] for a in (given, turned)]
    assert torch.equal(*before) and not torch.equal(given["lora_A"], turned["lora_A"])
    assert check.error_of(one["product"], other["product"])[0] < 1e-13
    plain = "not preconditioned"
    wrong = [dict(causes.riemannian_step(**a))[plain]()["product"] for a in (given, turned)]
    assert check.error_of(*wrong)[0] > 0.1


def test_the_relatives_written_out_are_right_without_a_mistake():
    """The loops and changes of W in which the mistakes are made, with none of them."""
    for name, (content, _) in CASES.items():
        function, (given, expected) = content["function"], right_answer(name)
        if function in ("loraplus", "riemannian", "lora_pro", "lora_rite"):
            got = written_out(function, **given)
        elif function == "weight_change":
            rest = {k: v for k, v in given["given"].items() if k != "lora_alpha"}
            changes = causes_adapters.wrong_changes(given["method"], **given["given"])
            got = changes[wrong_runs.NO_MISTAKE](rest)
        elif function == "reslora" and given["kind"] != "block":
            s = given.pop("lora_alpha") / len(given["blocks"][0]["lora_A"])
            got = causes_adapters.wrong_chain(**given, s=s, mistake=wrong_runs.NO_MISTAKE)
        else:
            continue
        assert check.error_of(got, expected)[0] < 1e-10, name


def written_out(function, adamw, ratio=1, delta=0, **given):
    """Steps of a rule by causes_rules.py."""
    none, s = wrong_runs.NO_MISTAKE, given["lora_alpha"] / len(given["lora_A"])
    if function == "lora_rite":
        return causes_rules.rite_steps(none, adamw=adamw, **given)
    rules = {
        "riemannian": causes_rules.preconditioner(delta),
        "lora_pro": causes_rules.pro_rule(s),
    }
    rates = {"adamw": adamw, "rates": (1, ratio)}
    return causes_rules.adamw_steps(none, rule=rules.get(function), **rates, **given)


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        (["delta_lora", "short_run", "train"], "the old pair is taken after the decay"),
        (["delta_lora", "short_run", "train"], "L2 in place of decoupled weight decay"),
        (["delta_lora", "delta_step", "short_run", "train"], "first order: "),
        (["delta_lora", "short_run", "train"], "the first old product is 0"),
        (["grad_norm", "snip", "snip_ranks", "scores", "rank_scores"], "scored batch by batch, "),
        (["grad_norm", "snip", "snip_ranks", "scores", "rank_scores"], "scored example by example"),
        (["grad_norm", "snip", "snip_ranks", "scores", "rank_scores"], "the last batch alone"),
        (["logits", "scores", "rank_scores", "train"], "padding is attended to (the mask is"),
        (["grad_norm", "snip", "synflow", "scores"], "divided by the number of parameters"),
        (
            ["lora_forward", "merge", "logits", "scores", "train", "synflow"],
            "scale lora_alpha // r",
        ),
        (["lora_backward"], "no scale in dL/dA"),
        (["logits", "scores", "rank_scores", "train"], "tanh GELU"),
        (["logits", "scores", "rank_scores", "train"], "token types are left out"),
        (["short_run", "train"], "modules that are off decay"),
        (["short_run", "train"], "decided after the step"),
        (["short_run", "train"], "B of what is off is set to 0"),
        (["short_run", "train"], "modules that are off are not scored, or score 0"),
        (["merge"], "delta W is not transposed, but W is (in, out)"),
        (["keep_top"], "all at the cut are kept (>= cut)"),
        (["keep_top"], "ceil for both counts"),
        (["keep_top", "within_budget"], "chosen by |score|"),
        (["dora", "weight_change"], "the norm is over the wrong axis: columns, not rows"),
        (["dora"], "the norm is over the wrong axis, and not detached"),
        (["dora"], "the norm is not detached"),
        (["lora_rite"], "clipped before a gradient is set to 0, not after"),
        (["lora_rite"], "the whole step of a factor is skipped where its rms is above 1"),
        (["lora_pro"], "bias correction is one step ahead, counted from 2, as published"),
        (["lora_pro"], "scale 2 whatever lora_alpha / r is, as published"),
        (["prolora", "weight_change"], "rolled along the features"),
        (["adalora_keep"], "all ties at the cut are dropped"),
        (["adalora_scores"], "w of after the step with the gradient of before"),
        (["adalora", "weight_change"], "scale lora_alpha / (r + 1e-5)"),
        (["loraplus"], "A and B swapped"),
        (["riemannian"], "B's metric is that of the new A, as published"),
        (["reslora"], "the first block takes its own input twice, as published"),
    ],
)
def test_mistakes_that_were_seen_have_a_name(functions, words):
    """Mistakes that real candidates made, and that nothing or something else was said of."""
    for function in functions:
        known = set()
        for name, (content, tensors) in CASES.items():
            if content["function"] == function and "-b0" not in name:
                known |= set(check.Row(content, tensors, "float64").mistakes())
        assert any(cause.startswith(words) for cause in known), function


def test_an_ambiguous_answer_gets_all_its_names():
    """3 // 2 is 1, as if there were no scale: one case cannot tell, another one can."""
    names = "scores-grad_norm-b-lora", "scores-grad_norm-b-shortcuts"  # alpha 3; 3 and 1; r 2
    rows = [check.Row(*CASES[name], "float64", error=1.0, verdict="FAIL") for name in names]
    for row in rows:
        row.outcome = dict(causes.scores(**row.arguments()))["no scale"]()
    check.diagnose(rows[:1])
    assert rows[0].reason == "likely: scale lora_alpha // r, rounded down, or no scale"
    check.diagnose(rows)
    assert [row.reason for row in rows] == ["likely: no scale"] * 2


# --------------------------------------------------------------------------------- the command line

WRONG = """
import numpy
from tools.oracle import ours
from tools.oracle.ours import *

def lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha, transposed):
    return ours.lora_forward(
        x, weight, bias, lora_A, lora_B, lora_alpha * len(lora_A), transposed
    )

def scores(proxy, **rest):
    if proxy not in ("fisher", "constant"):
        raise NotImplementedError
    return {n: (1 + (proxy == "fisher")) * v for n, v in ours.scores(proxy, **rest).items()}

def within_budget(scores, costs, budget):
    return set(scores)

def merge(weight, lora_A, lora_B, lora_alpha, transposed):
    return numpy.asarray(weight) + lora_alpha / len(lora_A) * numpy.asarray(lora_B @ lora_A)

def snip(**_):
    raise RuntimeError("no such thing")

def delta_step(weight, **rest):
    return weight.add_(1)  # what it is given, it may change

def delta_adapter(**_):
    return "nothing"

def lora_backward(**arguments):
    single = {k: v.float() if hasattr(v, "float") else v for k, v in arguments.items()}
    return ours.lora_backward(**single)

del delta_lora, logits, rank_scores, train
"""


@pytest.fixture(scope="module")
def wrong_rows(tmp_path_factory):
    """{(case, dtype): line} of one candidate with a mistake in each function."""
    path = tmp_path_factory.mktemp("wrong") / "wrong.py"
    path.write_text(WRONG)
    rows = check.check(GOLDEN, check.load_candidate(path))
    lines = check.table(rows)
    return {tuple(line.split()[:2]): line for line in lines[1:-1]}


@pytest.mark.parametrize(
    ("case", "dtype", "end"),
    [
        ("forward-linear", "float64", "FAIL  likely: scale lora_alpha instead of lora_alpha / r"),
        ("forward-square", "float32", "FAIL  likely: scale lora_alpha instead of lora_alpha / r"),
        ("scores-fisher-b-lora", "float64", "FAIL  likely: without the 1/2"),
        ("scores-fisher-b-lora", "float32", "FAIL  likely: without the 1/2"),
        ("scores-constant-b-lora", "float64", "  pass"),
        ("merge-linear", "float64", "  pass"),
        ("snip-b", "float32", "FAIL  RuntimeError: no such thing (line 23 of wrong.py)"),
        ("delta_step", "float64", "FAIL  no known cause"),
        ("delta_adapter-start2", "float64", "no dict with lora_A (R, in) and lora_B (out, R)"),
        ("backward-linear", "float32", "  pass"),
        ("backward-linear", "float64", "but as small as the rounding of float32"),
        ("delta-start3", "float64", "  -  not offered"),
    ],
)
def test_what_is_said_of_a_wrong_candidate(wrong_rows, case, dtype, end):
    assert wrong_rows[case, dtype].endswith(end)


def test_what_is_said_of_shapes_and_budgets(wrong_rows):
    said = wrong_rows["merge-transposed", "float64"]
    assert "likely: delta W is not transposed, but W is (in, out) (ValueError: operands" in said
    said = wrong_rows["merge-square-transposed", "float32"]
    assert said.endswith("FAIL  likely: delta W is not transposed, but W is (in, out)")
    assert "parameters, the budget is" in wrong_rows["budget-1-sizes-0.1", "float64"]
    assert "where a ValueError belongs" in wrong_rows["budget-impossible", "float64"]


def test_our_own_passes_everything(capsys):
    assert main(["check", "--candidate", ours.__file__]) == 0
    total = sum(len(content["dtypes"]) for content, _ in CASES.values())
    assert f"{total} pass, 0 fail, 0 not offered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "only", "code", "lines"),
    [
        ("", None, 3, None),
        ("", "merge", 3, 8),
        ("def merge(**_): raise NotImplementedError", "merge", 3, 8),
        ("from tools.oracle.ours import merge", "merge", 0, 8),
        ("from tools.oracle.ours import merge", "merge-linear", 0, 2),
        ("from tools.oracle.ours import merge", "lora_forward", 3, 8),
        ("def keep_top(scores, keep, together): return set()", "keep_top", 1, 16),
        ("def keep_top(scores, keep, together): return 3", "keep-ties", 1, 1),
    ],
)
def test_only_and_exit_codes(tmp_path, capsys, text, only, code, lines):
    path = tmp_path / "candidate.py"
    path.write_text(text)
    assert main(["check", "--candidate", str(path), *(["--only", only] if only else [])]) == code
    out = capsys.readouterr().out.splitlines()
    assert lines is None or len(out) == lines + 2
    assert code != 3 or out[-1].startswith("0 pass, 0 fail, ")


def test_nonsense_is_refused_in_one_line(tmp_path, capsys):
    own, broken = Path(ours.__file__), tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    for arguments, message in (
        ([str(GOLDEN), "--candidate", str(broken)], "cannot be imported"),
        ([str(GOLDEN), "--candidate", str(tmp_path / "none.py")], "is no Python file"),
        ([str(tmp_path), "--candidate", str(own)], "holds no cases"),
        (["--candidate", str(own), "--only", "snap"], "allowed: adalora, "),
    ):
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    case = json.loads((GOLDEN / "merge-linear.json").read_text())
    tensors = (GOLDEN / "merge-linear.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(tensors)
    for changed, message in (
        ({"function": "merge"}, "is not a case of the oracle: the content "),
        ({**case, "function": "torch"}, "function is 'torch', expected function of the interface"),
        ({**case, "dtypes": ["float16"]}, "is 'float16', expected name of a dtype"),
        ({**case, "tolerance": {}}, "a dtype without a tolerance"),
        ({**case, "expected": {"tensor": "x"}}, "lacks the tensor 'x'"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(changed))
        assert main(["check", str(tmp_path), "--candidate", str(own)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


ODD = """
from __future__ import annotations

import dataclasses

import numpy as np
import torch


@dataclasses.dataclass
class Setting:
    scale: float


def keep_top(scores, **_):
    return [[name] for name in scores]


def alora_exchange(**_):
    return {"pruned": np.array(["a", "b", "c", "d"]), "ranks": np.ones(3)}


def merge(weight, **_):
    return weight + 1j


def lora_forward(x, **_):
    import neighbour

    return neighbour.zeros(x).to("meta")
"""


def test_odd_results_are_failures_and_not_the_end_of_the_table(tmp_path, capsys):
    """Lists of lists, arrays, complex numbers, another device; a dataclass, an import at work."""
    path = tmp_path / "mine.py"
    path.write_text(ODD)
    (tmp_path / "neighbour.py").write_text("zeros = lambda x: x * 0\n")
    assert main(["check", "--candidate", str(path)]) == 1
    out = capsys.readouterr().out
    assert "complex, not real" in out and "No module named" not in out
    assert re.search(r"^0 pass, \d+ fail, \d+ not offered$", out, re.M)


def test_a_candidate_that_ends_the_program_has_not_passed(tmp_path, capsys):
    path = tmp_path / "ends.py"
    path.write_text("import sys\nsys.exit(0)\n")
    assert main(["check", "--candidate", str(path)]) == 2
    assert "cannot be imported: SystemExit(0)" in capsys.readouterr().err
    path.write_text("import sys\ndef merge(*args, **kwargs):\n    sys.exit(0)\n")
    assert main(["check", "--candidate", str(path), "--only", "merge"]) == 1
    assert "it ends the program: exit(0)" in capsys.readouterr().out


def test_the_interface_names_every_function_and_shortcut(capsys):
    assert set(check.interface_functions()) == set(FUNCTIONS)
    assert main(["interface"]) == 0
    text = capsys.readouterr().out
    for function in FUNCTIONS:
        assert f"\n{function}(" in text
    proxies = {right_answer(name)[0]["proxy"] for name in CASES if name.startswith("scores-")}
    for word in (*proxies, "residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------------------------------- comparing


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
        ([torch.ones(1), 2 * torch.ones(1)], [torch.ones(1), torch.ones(1)], 1.0),
        ([], [], 0.0),
    ],
)
def test_errors_between_results(got, expected, error):
    assert check.error_of(got, expected)[0] == error


def test_factors_are_compared_by_their_product():
    """Any invertible change between the factors is the same adapter; more than 2r ranks are not."""
    content, tensors = CASES["delta_adapter-start2"]
    pair = ours.delta_adapter(**check.Row(content, tensors, "float64").arguments())
    r = len(pair["lora_A"])
    change = torch.eye(r, dtype=torch.float64) + torch.ones(r, r, dtype=torch.float64)
    other = {"lora_A": change @ pair["lora_A"], "lora_B": pair["lora_B"] @ change.inverse()}
    padded = {
        "lora_A": torch.cat([pair["lora_A"], pair["lora_A"]]),
        "lora_B": torch.cat([pair["lora_B"], 0 * pair["lora_B"]], 1),
    }
    for answer, verdict in ((other, "pass"), (padded, "FAIL")):
        candidate = types.SimpleNamespace(delta_adapter=lambda answer=answer, **_: answer)
        assert check.judge(candidate, content, tensors, "float64").verdict == verdict
