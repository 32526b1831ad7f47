"""tools/compare.py and compare_report.py: what is run, when, and the numbers of the report."""

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from tqdm import tqdm

import tiny
import train
from support import checkpoint, glue, run_folder
from support import flags as flags_module
from tools import compare, compare_report

ROOT = Path(__file__).resolve().parents[1]
ARM = '[[arms]]\nname = "{}"\nspace = "s"\nflags = "--r {}"\nlrs = [1e-3, 3e-3]\n{}\n'
STUDY = """task = "mrpc"
flags = "--epochs 1"
[tune]
pairs = 2
split_seed = 1
seeds = [100, 101]
[final]
seeds = [1, 2]
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "mini.toml"
    second = ARM.format("b", 4, 'controls = ["a"]')
    path.write_text(STUDY + ARM.format("a", 2, "") + second + ARM.format("c", 8, "order = 2"))
    return compare.read_study(path)


def line(phase, arm, lr, seed, accuracy, **more):
    flags = f"--epochs 1 --r {dict(a=2, b=4, c=8)[arm]}"
    found = {"phase": phase, "arm": arm, "lr": lr, "seed": seed, "flags": flags}
    return {**found, "dev": [{"accuracy": 0.0}, {"accuracy": accuracy}], **more}


def run_all(study, accuracy_of):
    """Make every run in the order given; -> the runs in that order."""
    lines, order = [], []
    while True:
        missing, _ = compare.missing_runs(study, lines)
        if not missing:
            return order
        run = missing[0]
        order.append(run)
        lines.append(line(run.phase, run.arm, run.lr, run.seed, accuracy_of(run)))


def test_order_is_balanced_and_the_grid_widens_while_the_best_is_at_an_edge(study):
    best = {"a": 1e-3, "b": 1e-4, "c": 1e-2}
    order = run_all(study, lambda run: -abs(math.log(run.lr / best[run.arm])))
    tuned = {
        arm: sorted({r.lr for r in order if r.phase == "tune" and r.arm == arm}) for arm in "abc"
    }
    assert tuned["a"] == [3e-4, 1e-3, 3e-3]  # 1e-3 was an edge: one more below
    assert tuned["b"] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert tuned["c"] == [1e-3, 3e-3, 1e-2, 3e-2]
    final = [r for r in order if r.phase == "final"]
    assert [(r.arm, r.seed) for r in final] == [
        *(("a", 1), ("b", 1), ("a", 2), ("b", 2)),
        *(("c", 1), ("c", 2)),
    ]
    assert all(r.lr == best[r.arm] for r in final)
    assert len(set(order)) == len(order)


def test_equal_learning_rates_give_the_smaller_and_seeds_count_alike(study):
    lines = [
        *(line("tune", "a", lr, 100, 0.5) for lr in (3e-4, 1e-3, 3e-3)),
        *(line("tune", "a", lr, 101, x) for lr, x in ((3e-4, 0.1), (1e-3, 0.7), (3e-3, 0.7))),
    ]
    assert compare.tuning(study, study.arms[0], lines) == ([], 1e-3)
    lines[5] = line("tune", "a", 3e-3, 101, 0.8)
    missing, best = compare.tuning(study, study.arms[0], lines)
    assert best is None and {run.lr for run in missing} == {1e-2}
    # 860 of 1,200 right both times; as sums of fractions in floating point they differ
    for place, right in ((1, 313), (4, 547), (2, 314), (5, 546)):
        lines[place]["dev"][-1]["accuracy"] = right / 600
    assert compare.tuning(study, study.arms[0], lines) == ([], 1e-3)


def test_a_frozen_learning_rate_and_changed_flags_are_noticed(study, tmp_path):
    lines = [line("tune", "a", lr, s, 0.5 - lr) for lr in (3e-4, 1e-3, 3e-3) for s in (100, 101)]
    lines += [line("tune", "a", 1e-4, s, 0.1) for s in (100, 101)]
    assert compare.tuning(study, study.arms[0], lines) == ([], 3e-4)
    lines += [line("final", "a", 1e-3, 1, 0.5)]
    with pytest.raises(ValueError, match=r"final runs at lr 0\.001.*frozen"):
        compare.missing_runs(study, lines)
    lines[0]["flags"] = "--epochs 1 --r 3"
    with pytest.raises(ValueError, match="'--epochs 1 --r 3', the study says '--epochs 1 --r 2'"):
        compare.check_lines(study, lines, tmp_path)
    del lines[0]
    compare.check_lines(study, lines, tmp_path)
    for field, value in ("controls", ["c"]), ("space", "t"), ("split_seed", 2), ("tune_pairs", 3):
        other = [*lines, {**line("tune", "a", 1e-2, 100, 0.5), field: value}]
        with pytest.raises(ValueError, match=rf"was run with {field} .*, the study says"):
            compare.check_lines(study, other, tmp_path)
    same, other = ({"train": {"examples": 9, "sha256": digest}} for digest in ("0a", "0b"))
    bases = [{"base": split["train"], "config": split["train"]} for split in (same, other)]
    for phase, arm, data in (
        ("final", "a", same | bases[0]),
        ("tune", "a", other),  # of the tuning split
        (
            "final",
            "b",
            same | bases[1],
        ),  # what model it is, and a base with its names, is the arm's own
    ):
        lines.append({**line(phase, arm, 1e-3, 2, 0.5), "data": data})
    compare.check_lines(study, lines, tmp_path)
    longer = [dataclasses.replace(arm, flags="--r 2 --max-length 9") for arm in study.arms[:1]]
    other_texts = dataclasses.replace(study, arms=(*longer, *study.arms[1:]))
    read_otherwise = {
        **line("final", "a", 1e-3, 3, 0.5),
        "flags": "--epochs 1 --r 2 --max-length 9",
    }
    of_b = {**line("final", "b", 1e-3, 3, 0.5), "data": same}
    compare.check_lines(other_texts, [of_b, {**read_otherwise, "data": other}], tmp_path)
    for told, says in ((False, True), (True, False), (None, False)):
        changed = dataclasses.replace(study, verdicts=says)
        more = [{**x, "verdicts": told} if told is not None else x for x in lines[-1:]]
        with pytest.raises(ValueError, match=f"run with verdicts {told is not False}, the study"):
            compare.check_lines(changed, more, tmp_path)
    for arm, data, what in (("c", other, "train"), ("a", bases[1], "base")):
        more = [*lines, {**line("final", arm, 1e-3, 3, 0.5), "data": data}]
        with pytest.raises(ValueError, match=rf"'{arm}' was run on another {what} in seed 3 than"):
            compare.check_lines(study, more, tmp_path)


def test_without_widening_the_rates_that_are_listed_are_all_there_are(study):
    """The best of them, though it is at an edge; and one rate is not tried at all."""
    narrow = dataclasses.replace(study, widen=False)
    order = run_all(narrow, lambda run: run.lr)
    assert {run.lr for run in order if run.phase == "tune"} == {1e-3, 3e-3}
    assert {run.lr for run in order if run.phase == "final"} == {3e-3}
    single = [dataclasses.replace(arm, lrs=(1e-4,)) for arm in study.arms]
    order = run_all(dataclasses.replace(narrow, arms=tuple(single)), lambda run: 0.5)
    assert {(run.phase, run.lr) for run in order} == {("final", 1e-4)} and len(order) == 6
    # where the study may widen, one rate is a grid that begins there
    order = run_all(dataclasses.replace(study, arms=tuple(single)), lambda run: -run.lr)
    assert {run.lr for run in order if run.phase == "tune"} == set(compare.GRID[:7])


def test_dev_stands_for_the_test_set_where_the_study_says_so(study, tmp_path):
    """The embedded task needs no --data-dir; another one needs a folder."""
    embedded = dataclasses.replace(study, task="paraphrase", test="dev")
    folder = compare.task_folder(embedded, None, tmp_path)
    for name, source in (("train", "train"), ("dev", "dev"), ("test", "dev")):
        expected = (glue.EMBEDDED / f"{source}.tsv").read_bytes()
        assert (folder / f"{name}.tsv").read_bytes() == expected
    as_is = dataclasses.replace(embedded, test="test")
    assert compare.task_folder(as_is, None, tmp_path) == glue.EMBEDDED
    with pytest.raises(ValueError, match="a study of mrpc needs --data-dir"):
        compare.task_folder(study, None, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lrs = [1e-3, 3e-3]", "lrs = [2e-3]", "lr 0.002, allowed: 1 or 3 times"),
        ('name = "b"', 'name = "a"', "two arms"),
        ('controls = ["a"]', 'controls = ["x"]', "unknown control 'x'"),
        ("seeds = [1, 2]", "seeds = [100]", "in tune and in final"),
        ("seeds = [1, 2]", 'seeds = [1]\ntest = "train"', "'train', allowed: test, dev"),
        ("task =", "tusk =", "is not a study: the content lacks 'task'"),
        ("lrs = [1e-3, 3e-3]", "lrs = []", "lrs of arm 'a' is empty"),
        ("lrs = [1e-3, 3e-3]", 'lrs = "1e-3"', "lrs is '1e-3', expected list"),
        ('controls = ["a"]', 'contorls = ["a"]', r"arms\[1\] has 'contorls'"),
        ('controls = ["a"]', 'order = "first"', "order is 'first', expected count"),
        ("pairs = 2", 'pairs = "2"', "pairs is '2', expected count"),
        ("seeds = [1, 2]", 'seeds = "12"', "seeds is '12', expected list"),
        ("seeds = [1, 2]", "seeds = []", "final.seeds is empty"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "final.seeds has a number twice"),
        ("lrs = [1e-3, 3e-3]", "lrs = [1e-3, 0.001]", "lrs of arm 'a' has a number twice"),
        ("lrs = [1e-3, 3e-3]", "lrs = [1e-2, 1e-3]", "the lrs of arm 'a' have a gap"),
        ("[tune]", "[[tune]]", "is not a study: TypeError"),
        ('task = "mrpc"', 'task = "stsb"', "task is 'stsb', a study compares accuracy: .*mrpc"),
        ("[tune]", "[tune", "TOML"),
    ],
)
def test_bad_studies_are_one_line(tmp_path, old, new, message):
    text = STUDY + ARM.format("a", 2, "") + ARM.format("b", 4, 'controls = ["a"]')
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        compare.read_study(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_a_study_without_jobs_is_refused(jobs, capsys):
    assert compare.main(["run", "studies/mrpc.toml", "--jobs", jobs]) == 2
    error = capsys.readouterr().err
    assert f"'{jobs}' is not an integer from 1 up" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0.5", "arm 'a' has --lr, which the study itself gives"),
        ("--seed=9", "arm 'a' has --seed=9, which the study itself gives"),
        ("--no-such-flag 3", "arm 'a': unrecognized arguments: --no-such-flag 3"),
        ("--r 0", "arm 'a': argument --r: '0' is not an integer from 1 up"),
    ],
)
def test_flags_that_no_arm_has_are_refused(tmp_path, flags, message):
    """Before any run: train.py would take the study's rate and seed, and the line say the arm's."""
    path = tmp_path / "mini.toml"
    path.write_text(STUDY + ARM.format("a", 2, "").replace("--r 2", flags))
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.read_study(path)


def test_a_flag_with_its_value_behind_a_sign_reads_alike():
    both = "--epochs 1 --model=x --max-length=9", "--max-length 9 --epochs=1 --model x"
    assert compare.reading(both[0]) == compare.reading(both[1]) == ("x", "9", None)


def test_the_studies_that_are_shipped_can_be_read_and_their_flags_parse():
    for path in sorted((ROOT / "studies").glob("*.toml")):
        study = compare.read_study(path)
        for arm in study.arms:
            flags = [*compare.flags_of(study, arm).split(), "--task", study.task]
            args = flags_module.parse_flags(flags)
            if args.shortcuts != "none":
                assert args.shortcut_alpha / args.r == 0.5, arm.name
            if args.targets and "alpha" not in arm.name:
                assert args.lora_alpha / args.r == 2, arm.name


# ------------------------------------------------------------------------------------- results file


def test_a_torn_last_line_is_mended_and_nothing_is_counted_twice(tmp_path):
    path = tmp_path / "r.jsonl"
    one, two = line("tune", "a", 1e-3, 100, 0.5), line("tune", "a", 1e-3, 101, 0.5)
    path.write_text(json.dumps(one) + "\n" + json.dumps(two)[:20])
    assert compare_report.read_results(path) == [one]
    assert compare_report.read_results(path, mend=True) == [one]
    compare.append(path, two)
    assert compare_report.read_results(path) == [one, two]
    compare.append(path, one)
    with pytest.raises(ValueError, match=r"r\.jsonl:3 is the run of line 1 again"):
        compare_report.read_results(path)
    last = {"space": "s", "controls": [], "trainable": {"adapters": 1}, "predictions": "1"}
    final = line("final", "a", 1e-3, 1, 0.5, test={"accuracy": 0.5}, **last)
    path.write_text(json.dumps(final) + "\n")
    assert compare_report.read_results(path) == [final]
    damaged = [{"phase": "final"}, {**one, "lr": []}, {**one, "phase": []}, {**one, "dev": [{}]}]
    damaged += [{**final, "test": {}}, {**final, "dev": []}, {**final, "trainable": {}}]
    for content in ("{}", "[]", "[" * 10**5, *map(json.dumps, damaged)):
        path.write_text(content + "\n")
        with pytest.raises(ValueError, match=r"r\.jsonl:1 is no line of a study"):
            compare_report.read_results(path)


# ---------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("df", "t"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (29, 2.0452)])
def test_t_quantiles_are_those_of_the_printed_tables(df, t):
    assert compare_report.t_quantile(df) == pytest.approx(t, abs=1e-4)


def test_interval_over_seeds_on_known_numbers():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]  # mean 3, sd sqrt(2.5), t(4) = 2.776445
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    low, high = compare_report.over_seeds(values)
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-4)
    assert statistics.stdev(values) == pytest.approx(math.sqrt(2.5))


def test_interval_over_seeds_and_examples_on_known_numbers():
    # one seed, 400 examples, 100 of them +1: the mean of a resample is Binomial(400, 1/4) / 400
    matrix = np.zeros((1, 400))
    matrix[0, :100] = 1
    low, high = compare_report.over_seeds_and_examples(matrix)
    sd = math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - 1.96 * sd, 0.25 + 1.96 * sd), abs=0.004)
    # 2 seeds that differ on all examples: a resample of seeds has mean 0, 1/2 or 1
    rows = np.array([[0.0] * 50, [1.0] * 50])
    assert compare_report.over_seeds_and_examples(rows) == pytest.approx((0.0, 1.0))
    # additive: variance s^2/n of seeds + v/m of examples, both exact for the multinomial
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(30, 1)), rng.normal(size=(1, 200))
    low, high = compare_report.over_seeds_and_examples(a + b)
    sd = math.sqrt(a.var() / 30 + b.var() / 200)
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.05)


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        (((-0.9, 0.8), (-1.0, 1.0)), "no difference"),
        (((0.1, 0.9), (0.2, 0.8)), "no difference"),
        (((-0.9, 0.8), (-1.1, 1.0)), "not decided"),
        (((0.1, 2.0), (0.2, 3.0)), "a difference"),
        (((-3.0, -0.1), (-2.0, -0.2)), "a difference"),
        (((0.1, 2.0), (-0.2, 3.0)), "not decided"),
    ],
)
def test_verdicts_in_the_fixed_words(intervals, words):
    assert compare_report.verdict(*intervals) == words


def made_up(arm, seed, predictions, labels="11110000", controls=(), **more):
    """A final line; its test accuracy follows from the predictions."""
    hits = sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)
    return {
        **line("final", arm, 1e-3, seed, 0.7 + seed / 100),
        "space": "s",
        "controls": list(controls),
        "trainable": {"adapters": 18432, "head": 770},
        "test": {"accuracy": hits},
        "predictions": predictions,
        **more,
    }


def test_report_needs_nothing_but_the_lines(tmp_path):
    lines = [
        {"phase": "labels", "task": "mrpc", "labels": "11110000"},
        made_up("a", 1, "11110011"),  # 6 of 8
        made_up("b", 1, "11110000", controls=["a"], stored=61440),  # 8 of 8
        made_up("a", 2, "11110111"),  # 5 of 8
        made_up("b", 2, "11110001", controls=["a"], stored=18432),  # 7 of 8
        # a has no seed 3: not in the difference
        made_up("b", 3, "00001111", controls=["a"], stored=30720),
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| a | 18,432 | – | 0.001 | 2 | 71.5 ± 0.7 | 68.8 ± 8.8 |" in done.stdout
    assert "| b | 18,432 | 18,432 … 61,440 | 0.001 | 3 | " in done.stdout
    assert "| b − a | 2 | +25.0 | +25.0 … +25.0 | " in done.stdout
    assert " | at 10 seeds |\n" in done.stdout and "5 final runs, 0 tune runs" in done.stdout
    assert (tmp_path / "r.png").stat().st_size > 5000
    unjudged = [{**x, "verdicts": False} if x["phase"] == "final" else x for x in lines]
    text = "\n".join(compare_report.report(unjudged))
    assert "| b − a | 2 | +25.0 | +25.0 … +25.0 | " in text
    assert "verdict" not in text and "decided" not in text
    tables = [x.count("|") for x in text.splitlines() if x.startswith("|")]
    assert tables == [8] * 4 + [6] * 3  # a heading, a rule and the rows are of one width
    changed = [x | {"commit": "c0ffee00" + "+changes" * (x["seed"] > 1)} for x in lines[1:]]
    text = "\n".join(compare_report.report([lines[0], *changed]))
    assert text.endswith("; commits c0ffee0, c0ffee0+changes.")
    other = [x | {"test": {"accuracy": 0.5}} if x.get("seed") == 2 else x for x in lines]
    with pytest.raises(ValueError, match=r"seed 2: its predictions have accuracy 0\.[68]"):
        compare_report.report(other)
    on_dev = [x | {"dev": [x["test"]]} if x["phase"] == "final" else x for x in unjudged]
    text = "\n".join(compare_report.report(on_dev))
    assert "| a | 18,432 | – | 0.001 | 2 | 68.8 ± 8.8 |\n" in text
    assert "| difference in dev accuracy, points |" in text and "test" not in text
    tables = [x.count("|") for x in text.splitlines() if x.startswith("|")]
    assert tables == [7] * 4 + [6] * 3
    chance = {"dev": [{"accuracy": 0.75, "f1": 0.5}], "test": {"accuracy": 0.75, "f1": 0.6}}
    arms = compare_report.finals([lines[1] | chance])
    assert compare_report.reported(arms) == "test"  # as right on both, and not the same set


def test_the_picture_has_a_dot_a_run_and_a_bar_at_the_mean(tmp_path, monkeypatch):
    lines = [{"phase": "labels", "task": "mrpc", "labels": "11110000"}]
    for seed, predictions in (1, "11110011"), (2, "11110111"), (3, "11110000"):  # 6, 5, 8 of 8
        lines += [made_up("a", seed, predictions), made_up("b", seed, "00001111")]
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append(a[1:3]) or plot(*a, **k))
    compare_report.draw(lines, tmp_path / "r.png")
    assert drawn[0] == ([75.0, 62.5, 100.0], [0, 0, 0])
    assert drawn[1] == ([pytest.approx(237.5 / 3)] * 2, [-0.3, 0.3])
    assert drawn[2] == ([0.0, 0.0, 0.0], [1, 1, 1])


def test_a_verdict_needs_ten_seeds():
    lines = [{"phase": "labels", "task": "mrpc", "labels": "11110000"}]
    for seed in range(1, 11):
        assert "difference |" not in "\n".join(compare_report.report(lines))
        lines += [made_up("a", seed, "11110111"), made_up("b", seed, "11110000", controls=["a"])]
    assert "| b − a | 10 | +37.5 | +37.5 … +37.5 |" in "\n".join(compare_report.report(lines))
    assert "| a difference |" in "\n".join(compare_report.report(lines))


def test_two_rates_of_one_arm_are_not_mixed():
    lines = [made_up("a", 1, "11110011"), {**made_up("a", 1, "11110111"), "lr": 3e-3}]
    with pytest.raises(ValueError, match=r"arm 'a' has final runs at lr 0\.001 and at 0\.003"):
        compare_report.report(lines)


def test_a_line_has_every_decision(tmp_path):
    assert compare.decisions_of(tmp_path) == []
    modules = {"x": True, "y": False, "z": True}
    ranks = {"x": [0, 3], "y": [], "z": [1]}
    history = [{"step": 0, "on": modules}, {"step": 46, "on": ranks}]
    (tmp_path / "allocation.json").write_text(json.dumps({"history": history}))
    found = compare.decisions_of(tmp_path)
    assert found == [[0, ["x", "z"]], [46, {"x": [0, 3], "z": [1]}]]


# --------------------------------------------------------------------------------- studies for real


class Forked:
    """subprocess.Popen for train.py: the same command, in a fork that has torch loaded already."""

    def __init__(self, command, stdout, stderr, env):
        assert command[0] == sys.executable and command[1].endswith("train.py")
        assert env["OMP_NUM_THREADS"] == "1"
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
                tqdm.set_lock(threading.RLock())
                code = train.main(command[2:])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def real(tmp_path, monkeypatch):
    """go(results, work) makes the runs of a study of two arms on a tiny model, two at a time."""
    monkeypatch.setattr(compare, "subprocess", types.SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(compare, "GRID", [3e-3])  # nowhere to widen to: one tune run a seed
    data, model = tiny.task_folder(tmp_path / "data"), tiny.bert_folder(tmp_path / "model")
    (data / "test.tsv").write_bytes((data / "dev.tsv").read_bytes())
    text = STUDY.replace('"--epochs 1"', f'"--model {model} --preset lora --device cpu"')
    text = text.replace("seeds = [100, 101]", "seeds = [100]").replace("pairs = 2", "pairs = 4")
    arms = ARM.format("a", 2, "") + ARM.format("b", 3, 'controls = ["a"]')
    path = tmp_path / "mini.toml"
    path.write_text((text + arms).replace("lrs = [1e-3, 3e-3]", "lrs = [3e-3]"))
    study = compare.read_study(path)

    def go(name):
        (tmp_path / name).mkdir(exist_ok=True)
        results = tmp_path / f"{name}.jsonl"
        compare.run_study(study, results, tmp_path / name, data, jobs=2)
        return compare_report.read_results(results)

    return go


def without_seconds(lines):
    runs = [{k: v for k, v in x.items() if k != "seconds"} for x in lines]
    return sorted(runs, key=lambda x: (x["phase"], x.get("arm", ""), x.get("seed", 0)))


def made_in(work):
    """{(phase, arm, seed, rate, r, training pairs, dev pairs)} of the run folders of a study."""
    made = set()
    for path in work.glob("*-*/config.json"):
        flags, data = (run_folder.read_config(path.parent, key) for key in ("flags", "data"))
        sizes = data["train"]["examples"], data["dev"]["examples"]
        name = path.parent.name.split("-")[:2]
        made.add((*name, flags["seed"], flags["lr"], flags["r"], *sizes))
    return made


def test_a_study_makes_each_run_once_and_an_interrupted_one_goes_on(real, tmp_path, monkeypatch):
    """Stopped twice, its file torn at the end: the lines are those of the whole study."""
    whole = real("whole")
    labels, *runs = whole
    assert labels["phase"] == "labels" and len(labels["labels"]) == 10
    keys = [(x["phase"], x["arm"], x["seed"]) for x in runs]
    assert len(set(keys)) == len(keys) == 2 + 4
    for x in runs:
        assert len(x["dev"]) == 3 and set(x["trainable"]) == {"adapters", "head"}
        kept = {"train", "dev", "config", "base"} | ({"test"} if x["phase"] == "final" else set())
        assert set(x["data"]) == kept and x["decisions"] == []
        if x["phase"] == "final":
            right = sum(p == y for p, y in zip(x["predictions"], labels["labels"], strict=True))
            assert x["test"]["accuracy"] == pytest.approx(right / 10)
        else:
            assert "test" not in x and "predictions" not in x
    assert not (tmp_path / "whole" / "tune" / "test.tsv").exists()
    assert made_in(tmp_path / "whole") == {  # 24 pairs train, of which 4 are the tuning split
        (x["phase"], x["arm"], x["seed"], x["lr"], {"a": 2, "b": 3}[x["arm"]])
        + ((20, 4) if x["phase"] == "tune" else (24, 10))
        for x in runs
    }

    pause, step = compare.time.sleep, train.train_step

    def slowly(run, group, lr):
        pause(0.1)
        return step(run, group, lr)

    def interrupted(seconds):
        pause(seconds)
        under_way = [p.read_text() for p in (tmp_path / "broken").glob("*-*/metrics.jsonl")]
        if any('"eval"' in log and '"done"' not in log for log in under_way):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", slowly)
        patch.setattr(compare.time, "sleep", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                real("broken")
    path = tmp_path / "broken.jsonl"
    path.write_text(path.read_text() + '{"phase": "fin')  # torn by a crash
    assert without_seconds(real("broken")) == without_seconds(whole)


def test_a_run_that_fails_stops_the_study_with_its_reason(real, tmp_path, monkeypatch):
    """A full disk, say: nothing is put on record, and the same command goes on afterwards."""

    def full(_folder, _state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(RuntimeError, match=r"tune-.* ended with exit code 1: .*No space left"):
        real("full")
    assert [x["phase"] for x in compare_report.read_results(tmp_path / "full.jsonl")] == ["labels"]
    (tmp_path / "full.jsonl").write_text('{"phase": "labels", "task": "mrpc", "labels": "01"}\n')
    with pytest.raises(ValueError, match=r"was made with another test set than .*data"):
        real("full")


def test_a_rate_whose_loss_is_not_a_number_is_the_worst(study, tmp_path):
    """A tune run that diverged is on record, its rate not chosen; of a final run it is an error."""
    lines = [line("tune", "a", lr, s, 0.3) for lr in (1e-4, 3e-4, 1e-3, 3e-3) for s in (100, 101)]
    for x in lines[-2:]:
        x["dev"] = []
    lines += [line("tune", "a", 3e-5, s, 0.2) for s in (100, 101)]
    assert compare.tuning(study, study.arms[0], lines) == ([], 1e-4)
    (tmp_path / "run.log").write_text("0%\rtrain.py: the loss of step 7 is nan: lower --lr\n")
    arm, folder = study.arms[0], tmp_path / "run"
    tune, final = (compare.Run(phase, "a", 3e-3, 1) for phase in ("tune", "final"))
    found = compare.line_after(study, arm, tune, folder, 1)
    assert found["dev"] == [] and found["stopped"].endswith("step 7 is nan: lower --lr")
    for run, code in (final, 1), (tune, 2):
        with pytest.raises(RuntimeError, match=f"ended with exit code {code}: train.py: the loss"):
            compare.line_after(study, arm, run, folder, code)
    for text, diverged in (
        ("step 9: the grad_norm score of layers.0.q_proj is nan: look for a loss that", True),
        ("step 9 has made a parameter that is not a number", True),
        ("linalg.eigh: The algorithm failed to converge", True),
        ("No space left on device", False),
    ):
        (tmp_path / "run.log").write_text(f"train.py: {text}\n")
        if diverged:
            assert text in compare.line_after(study, arm, tune, folder, 1)["stopped"]
            continue
        with pytest.raises(RuntimeError, match="ended with exit code 1"):
            compare.line_after(study, arm, tune, folder, 1)


# ------------------------------------------------------------------------------------------- split


def test_the_tuning_split_is_a_partition_drawn_by_its_seed(tmp_path):
    rows = [f"{i}\ttext {i}" for i in range(10)]
    (tmp_path / "train.tsv").write_text("\n".join(["head\ttext", *rows]) + "\n")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        compare.split_training_set(tmp_path, tmp_path / name, 4, seed)
    read = {n: [(tmp_path / n / f).read_text() for f in ("dev.tsv", "train.tsv")] for n in "abc"}
    assert read["a"] == read["b"] != read["c"]
    parts = [text.splitlines() for text in read["a"]]
    assert [len(p) for p in parts] == [5, 7] and all(p[0] == "head\ttext" for p in parts)
    assert sorted(parts[0][1:] + parts[1][1:]) == sorted(rows)
    with pytest.raises(ValueError, match=r"tune\.pairs is 10.*10 rows"):
        compare.split_training_set(tmp_path, tmp_path / "d", 10, 1)


# ------------------------------------------------------------------------------- what is recorded


def test_a_line_says_what_the_run_said(study, tmp_path):
    folder, run = tmp_path / "f", compare.Run("final", "a", 1e-3, 1)
    folder.mkdir()
    config = {"flags": {}, "data": {"dev": 1}, "versions": {"git": "c", "torch": "t"}}
    run_folder.write_json(folder / "config.json", config)
    assert compare.line_of(study, study.arms[0], run, folder) is None
    run_folder.log(folder, "eval", step=1, epoch=1, accuracy=0.5)
    run_folder.log(
        folder,
        "done",
        dev={"accuracy": 0.5},
        test={"accuracy": 0.25},
        test_predictions="01",
        trainable={"adapters": 5, "head": 1},
        stored=7,
        seconds=3.0,
        score_seconds=1.0,
    )
    found = compare.line_of(study, study.arms[0], run, folder)
    assert (found["dev"], found["test"]) == ([{"accuracy": 0.5}], {"accuracy": 0.25})
    assert (found["predictions"], found["stored"], found["seconds"]) == ("01", 7, 3.0)
    assert (found["data"], found["commit"], found["versions"]) == ({"dev": 1}, "c", {"torch": "t"})


def test_other_flags_are_another_folder(study, tmp_path):
    run = compare.Run("tune", "a", 1e-3, 100)
    one, other = (compare.folder_of(run, f"--r {r}", tmp_path) for r in (2, 3))
    assert one != other


@pytest.fixture
def begun(study, tmp_path, monkeypatch):
    """go() begins a study, up to its first process, which raises InterruptedError."""

    def popen(*_, **__):
        raise InterruptedError

    data, work = tiny.task_folder(tmp_path / "data"), tmp_path / "work"
    (data / "test.tsv").write_bytes((data / "dev.tsv").read_bytes())
    work.mkdir()
    monkeypatch.setattr(compare, "subprocess", types.SimpleNamespace(Popen=popen))
    return lambda: compare.run_study(study, tmp_path / "r.jsonl", work, data, 1)


def test_rates_are_chosen_on_the_split_that_the_lines_state(begun, study, tmp_path):
    with pytest.raises(InterruptedError):
        begun()
    again = tmp_path / "again"
    compare.split_training_set(tmp_path / "data", again, study.tune_pairs, study.split_seed)
    for name in ("dev.tsv", "train.tsv"):
        made = (tmp_path / "work" / "tune" / name).read_bytes()
        assert made == (again / name).read_bytes()


def test_the_split_has_the_names_that_the_task_reads(tmp_path, study, monkeypatch):
    """MNLI's development set is dev_matched.tsv."""
    monkeypatch.setattr(compare, "make_missing", lambda *_: None)
    lines = "sentence1\tsentence2\tgold_label\n" + "a\tb\tneutral\nc\td\tentailment\n" * 3
    for name in ("train.tsv", "dev_matched.tsv", "test_matched.tsv"):
        (tmp_path / name).write_text(lines)
    mnli, work = dataclasses.replace(study, task="mnli"), tmp_path / "work"
    work.mkdir()
    compare.run_study(mnli, tmp_path / "r.jsonl", work, tmp_path, 1)
    train, dev = glue.load_task("mnli", work / "tune")
    assert (len(train), len(dev)) == (4, 2)


def test_lines_are_checked_before_a_study_goes_on(begun, tmp_path):
    compare.append(tmp_path / "r.jsonl", line("tune", "a", 1e-3, 100, 0.5, split_seed=2))
    with pytest.raises(ValueError, match="was run with split_seed 2"):
        begun()


def test_what_a_study_says_of_itself_is_heard(tmp_path):
    path, text = tmp_path / "m.toml", STUDY.replace("pairs = 2", "pairs = 2\nwiden = false")
    path.write_text(text + "verdicts = false\n" + ARM.format("a", 2, ""))
    study = compare.read_study(path)
    assert (study.widen, study.verdicts) == (False, False)
    about = compare.about(study, study.arms[0], compare.Run("final", "a", 1e-3, 1))
    assert about["verdicts"] is False


def test_tuning_goes_seed_by_seed_and_rate_by_rate_with_the_arms_in_turn(study):
    found = [run for run in compare.missing_runs(study, [])[0] if run.arm in "ab"]
    found = [(run.seed, run.lr, run.arm) for run in found]
    assert found == sorted(found) and len(found) == 8


def test_two_programs_do_not_make_one_study(study, tmp_path, monkeypatch, capsys):
    """Whatever folders they work in: it is one results file."""
    monkeypatch.setattr(compare, "make_missing", lambda *_: None)
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    data = tiny.task_folder(tmp_path / "data")
    (data / "test.tsv").write_bytes((data / "dev.tsv").read_bytes())
    words = ["run", str(tmp_path / "mini.toml"), "--results", str(tmp_path / "r.jsonl")]
    words += ["--data-dir", str(data), "--work", str(tmp_path / "w")]
    with run_folder.locked_file(tmp_path / "r.jsonl"):
        assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert "another process is writing to" in error and error.count("\n") == 1
    assert compare.main(words) == 0


def test_a_verdict_needs_both_intervals():
    """One pair of eight, the same in every seed: nothing varies over seeds, all over pairs."""
    lines = [{"phase": "labels", "task": "mrpc", "labels": "11110000"}]
    for seed in range(1, 11):
        lines += [made_up("a", seed, "11110001"), made_up("b", seed, "11110000", controls=["a"])]
    text = "\n".join(compare_report.report(lines))
    assert "| b − a | 10 | +12.5 | +12.5 … +12.5 | +0.0 … +37.5 | not decided |" in text
