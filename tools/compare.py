"""A study: arms x learning rates x seeds, every run on record.

    python tools/compare.py run studies/mrpc.toml --data-dir DIR --jobs 2
    python tools/compare.py report results/mrpc.jsonl

A study has two phases. In `tune` every arm tries its learning rates on a split of the training set
alone; the best one is frozen. In `final` every arm trains on the whole training set with other
seeds, the same for all arms, and is evaluated on dev and test after its last epoch. The learning
rates of an arm widen by half a decade while the best one is at an edge, unless the study says
`widen = false`; then an arm with one rate has it, untried.

No choice looks at dev, so a task without a labelled test set may be reported on it: `test = "dev"`.

    word     | meaning
    study    | studies/NAME.toml: task, flags, splits, seeds, arms
    arm      | one setting of train.py's flags, with the arms that are its controls
    space    | what is adapted, and the budget: arms of one space are compared
    order    | 1, 2, …: arms of order 2 begin when no run of order 1 is left to start
    line     | one finished run in results/NAME.jsonl, or the labels of the test set

What is missing is run, one thread each, seed by seed with the arms in turn, so that the lines of
an interrupted study are a balanced study already. What was interrupted is resumed.

What this file does not do: tables, intervals and pictures (compare_report.py).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from support import glue, run_folder
from support.errors import one_line
from support.flags import Parser, number, parse_flags
from support.form import count, finite, misfit
from tools import compare_report

ROOT = Path(__file__).resolve().parents[1]
DIVERGED = (
    "the loss of step",
    "the loss of the model",
    "an output of the model",
    " score of ",
    "a parameter that is not a number",
    "linalg.",
)
GRID = [float(f"{m}e{e}") for e in range(-7, 1) for m in (1, 3)]  # half a decade apart


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting; lrs are the learning rates that are tried first."""

    name: str
    space: str
    flags: str
    lrs: tuple
    order: int = 1
    controls: tuple = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """The content of a study's TOML file."""

    name: str
    task: str
    flags: str
    tune_pairs: int
    split_seed: int
    tune_seeds: tuple
    final_seeds: tuple
    arms: tuple
    widen: bool = True
    test: str = "test"  # what the final runs report: test, or dev
    verdicts: bool = True  # whether the report judges the differences


@dataclasses.dataclass(frozen=True)
class Run:
    """What a line is about; two lines about the same run are an error."""

    phase: str  # tune | final
    arm: str
    lr: float
    seed: int


# ---------------------------------------------------------------------------------------- the study


OF_THE_STUDY = (  # flags of train.py that no arm has
    *("--task", "--data-dir", "--lr", "--seed", "--out"),
    *("--test", "--resume", "--eval-only", "--dry-run"),
)
ARM = {"name": str, "space": str, "flags": str, "lrs": [finite], "order": count, "controls": [str]}
FORM = {
    "task": str,
    "flags": str,
    "tune": {"pairs": count, "split_seed": count, "seeds": [count], "widen": bool},
    "final": {"seeds": [count], "test": str, "verdicts": bool},
    "arms": [ARM],
}


def read_study(path):
    """A Study from its TOML file. Raises ValueError or OSError with one line."""
    try:
        content = tomllib.loads(path.read_text())
        content["arms"] = [{"order": 1, "controls": [], **arm} for arm in content["arms"]]
        content["tune"] = {"widen": True, **content["tune"]}
        content["final"] = {"test": "test", "verdicts": True, **content["final"]}
        wrong = misfit(content, FORM)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a study: {error!r}") from error
    if wrong:
        raise ValueError(f"{path} is not a study: {wrong}")
    tune, final = content["tune"], content["final"]
    arms = [
        Arm(**{**arm, "lrs": tuple(map(float, arm["lrs"])), "controls": tuple(arm["controls"])})
        for arm in content["arms"]
    ]
    study = Study(
        name=path.stem,
        task=content["task"],
        flags=content["flags"],
        tune_pairs=tune["pairs"],
        split_seed=tune["split_seed"],
        tune_seeds=tuple(tune["seeds"]),
        final_seeds=tuple(final["seeds"]),
        arms=tuple(arms),
        widen=tune["widen"],
        test=final["test"],
        verdicts=final["verdicts"],
    )
    check_study(study, path)
    return study


def check_study(study, path):
    """Raises ValueError with one line where the study's values do not go together."""
    told = [name for name, task in glue.TASKS.items() if "accuracy" in task.metrics]
    if study.task not in told:
        allowed = ", ".join(told)
        raise ValueError(f"{path}: task is {study.task!r}, a study compares accuracy: {allowed}")
    if study.test not in ("test", "dev"):
        raise ValueError(f"{path}: final.test is {study.test!r}, allowed: test, dev")
    lists = {f"lrs of arm {arm.name!r}": arm.lrs for arm in study.arms}
    lists |= {"arms": study.arms, "final.seeds": study.final_seeds, "tune.seeds": study.tune_seeds}
    for what, values in lists.items():
        if not values:
            raise ValueError(f"{path}: {what} is empty")
        if what != "arms" and len(set(values)) < len(values):
            raise ValueError(f"{path}: {what} has a number twice")
    names = [arm.name for arm in study.arms]
    for arm in study.arms:
        if names.count(arm.name) > 1:
            raise ValueError(f"{path}: two arms are called {arm.name!r}")
        for lr in arm.lrs:
            if lr not in GRID:
                raise ValueError(
                    f"{path}: arm {arm.name!r} has lr {lr:g}, allowed: 1 or 3 times a power of ten"
                )
        places = sorted(GRID.index(lr) for lr in arm.lrs)
        if study.widen and places[-1] - places[0] >= len(places):
            raise ValueError(
                f"{path}: the lrs of arm {arm.name!r} have a gap, and a rate is taken only with "
                "its neighbours tried: add those between, or set tune.widen = false"
            )
        for control in arm.controls:
            if control not in names:
                raise ValueError(f"{path}: arm {arm.name!r} has an unknown control {control!r}")
        check_flags(study, arm, path)
    if set(study.tune_seeds) & set(study.final_seeds):
        raise ValueError(f"{path}: a seed is in tune and in final: tuned on what is reported")


def check_flags(study, arm, path):
    """Raises ValueError where train.py would not take an arm's flags, or the study gives one."""
    words = shlex.split(flags_of(study, arm))
    both = [word for word in words if parts_of(word)[0] in OF_THE_STUDY]
    if both:
        raise ValueError(f"{path}: arm {arm.name!r} has {both[0]}, which the study itself gives")
    try:
        parse_flags([*words, "--task", study.task])
    except ValueError as error:
        raise ValueError(f"{path}: arm {arm.name!r}: {error}") from error


def run_of(line):
    return Run(line["phase"], line["arm"], line["lr"], line["seed"])


def check_lines(study, lines, path):
    """Raises ValueError where a line belongs to another study, or its arm has changed since."""
    arms, before = {arm.name: arm for arm in study.arms}, {}
    for line in lines:
        if line["phase"] == "labels" or line["arm"] not in arms:
            continue  # an arm that the study no longer has stays on record
        for what, found in line.get("data", {}).items():
            # All arms that read texts alike have the same splits; a base is told with its names.
            alike = line["arm"] if what in ("base", "config") else reading(line["flags"])
            key = line["phase"], what, alike
            if before.setdefault(key, found) != found:
                raise ValueError(
                    f"{path}: arm {line['arm']!r} was run on another {what} in seed {line['seed']} "
                    "than the runs before: take its lines away, or bring the data back"
                )
        for field, value in about(study, arms[line["arm"]], run_of(line)).items():
            told = line.get(field, True if field == "verdicts" else value)
            if told != value:
                raise ValueError(
                    f"{path}: arm {line['arm']!r} was run with {field} {told!r}, the study "
                    f"says {value!r}: give the arm another name, or take its lines away"
                )


def reading(flags):
    """The flags by which texts become examples, as they stand last among an arm's flags."""
    words = [part for word in shlex.split(flags) for part in parts_of(word)]
    given = dict(itertools.pairwise(words))
    return tuple(given.get(f"--{name}") for name in ("model", "max-length", "train-records"))


def parts_of(word):
    """A word of a command line; --flag=value as the two that it stands for."""
    return word.split("=", 1) if word.startswith("--") else [word]


def flags_of(study, arm):
    return f"{study.flags} {arm.flags}".strip()


# --------------------------------------------------------------------------------- what is missing


def tuning(study, arm, lines):
    """The state of an arm's tuning.

    Returns:
        (missing, best): the tune runs that are still to be made for the learning rates that are
        known to be needed; and the learning rate with the highest mean accuracy on the tuning
        split (the smaller of equals), or None while runs are missing.
    """
    if not study.widen and len(arm.lrs) == 1:
        return [], arm.lrs[0]
    found = {run_of(line): accuracy(line) for line in lines if line["phase"] == "tune"}
    tried = sorted(arm.lrs)
    while True:
        wanted = [Run("tune", arm.name, lr, seed) for seed in study.tune_seeds for lr in tried]
        missing = [run for run in wanted if run not in found]
        if missing:
            return missing, None
        means = {lr: sum(found[run] for run in wanted if run.lr == lr) for lr in tried}
        # Rounded: equal numbers of right answers have equal means, whatever the order of the sum.
        best = max(tried, key=lambda lr: round(means[lr], 9))
        place = GRID.index(best)
        if not study.widen:
            return [], best
        if best == tried[0] and place > 0:
            tried = [GRID[place - 1], *tried]
        elif best == tried[-1] and place + 1 < len(GRID):
            tried = [*tried, GRID[place + 1]]
        else:
            return [], best


def accuracy(line):
    """Of the last epoch, on the tuning split or dev; 0 for a run whose loss was not a number."""
    return line["dev"][-1]["accuracy"] if line["dev"] else 0.0


def missing_runs(study, lines):
    """The runs that can be made now, in the order in which they should be; and how many follow.

    Returns:
        (list of Run, int): the int counts final runs of arms whose tuning is not finished.
    """
    done = {run_of(line) for line in lines if line["phase"] != "labels"}
    result, later = [], 0
    for order in sorted({arm.order for arm in study.arms}):
        tune, final = [], []
        for place, arm in enumerate(a for a in study.arms if a.order == order):
            missing, best = tuning(study, arm, lines)
            tune += [((study.tune_seeds.index(r.seed), r.lr, place), r) for r in missing]
            if best is None:
                later += len(study.final_seeds)
                continue
            for index, seed in enumerate(study.final_seeds):
                run = Run("final", arm.name, best, seed)
                other = [r for r in done if r.phase == "final" and r.arm == arm.name]
                if any(r.lr != best for r in other):
                    raise ValueError(
                        f"arm {arm.name!r} has final runs at lr {other[0].lr:g}, and its tune runs "
                        f"now say {best:g}: its learning rate was frozen"
                    )
                if run not in done:
                    final.append(((index, place), run))
        result += [run for _, run in sorted(tune, key=lambda x: x[0])]
        result += [run for _, run in sorted(final, key=lambda x: x[0])]
    return result, later


# ----------------------------------------------------------------------------------------- one run


def split_training_set(folder, target, pairs, seed, dev="dev.tsv"):
    """Rows of folder/train.tsv, shuffled: the first `pairs` to target's dev, else train.tsv."""
    header, *rows = (folder / "train.tsv").read_bytes().rstrip(b"\r\n").split(b"\n")
    if not 0 < pairs < len(rows):
        raise ValueError(f"tune.pairs is {pairs}, {folder}/train.tsv has {len(rows)} rows")
    random.Random(seed).shuffle(rows)
    target.mkdir(parents=True, exist_ok=True)
    for name, part in ((dev, rows[:pairs]), ("train.tsv", rows[pairs:])):
        run_folder.write_atomic(target / name, b"\n".join([header, *part]) + b"\n")


def folder_of(run, flags, work):
    """The run folder; its name holds a hash of the flags, so that other flags are another run."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.arm.lower()).strip("-")
    digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return work / f"{run.phase}-{slug}-{digest}-{run.lr:g}-{run.seed}"


def start(study, run, flags, folder, data_dir):
    """Start or resume a run in a process of its own, with one thread; returns the Popen."""
    command = [sys.executable, str(ROOT / "train.py")]
    if (folder / "config.json").is_file():
        command += ["--resume", str(folder), "--data-dir", str(data_dir)]
    else:
        command += [*shlex.split(flags), "--task", study.task, "--data-dir", str(data_dir)]
        command += ["--lr", f"{run.lr:g}", "--seed", str(run.seed), "--out", str(folder)]
        command += ["--test"] if run.phase == "final" else []
    with open(folder.with_name(folder.name + ".log"), "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def about(study, arm, run):
    """What every line begins with: which run it is of."""
    line = {
        "phase": run.phase,
        "arm": arm.name,
        "space": arm.space,
        "controls": list(arm.controls),
        "flags": flags_of(study, arm),
        "seed": run.seed,
        "lr": run.lr,
    }
    if run.phase == "tune":
        line |= {"tune_pairs": study.tune_pairs, "split_seed": study.split_seed}
    return {**line, "verdicts": study.verdicts}


def line_of(study, arm, run, folder):
    """The line of a finished run, or None if it is not finished."""
    log = run_folder.read_log(folder)
    done = [event for event in log if event["event"] == "done"]
    if not done:
        return None
    config = json.loads((folder / "config.json").read_text())
    versions = config["versions"]
    line = {
        **about(study, arm, run),
        "data": config["data"],
        "commit": versions.pop("git"),
        "versions": versions,
        "dev": [
            {k: v for k, v in event.items() if k not in ("event", "step", "epoch")}
            for event in log
            if event["event"] == "eval"
        ],
        "trainable": done[0]["trainable"],
        "stored": done[0].get("stored"),
        "seconds": done[0]["seconds"],
        "decisions": decisions_of(folder),
    }
    if run.phase == "final":
        line |= {"test": done[0]["test"], "predictions": done[0]["test_predictions"]}
    return line


def decisions_of(folder):
    """[[step, names on]] of every decision of a run; of single ranks {name: ranks on} for names."""
    path = folder / "allocation.json"
    history = json.loads(path.read_text())["history"] if path.is_file() else []
    found = []
    for step, on in ((decision["step"], decision["on"]) for decision in history):
        by_rank = any(isinstance(value, list) for value in on.values())
        chosen = {name: value for name, value in on.items() if value}
        found.append([step, chosen if by_rank else list(chosen)])
    return found


def not_a_number(study, arm, run, text):
    """The line of a tune run that ended because its loss was not a number: the worst there is."""
    return {**about(study, arm, run), "dev": [], "stopped": text}


# ---------------------------------------------------------------------------------------- all runs


def append(path, line):
    """Add a line to the results; what a crash cuts short is one torn last line (read_results)."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def task_folder(study, data_dir, work):
    """The folder of the final runs; where dev is what is reported, a copy that has it as the test.

    Raises:
        ValueError, OSError: no such task or folder.
    """
    source = glue.task_folder(study.task, data_dir)
    if source is None:
        raise ValueError(f"a study of {study.task} needs --data-dir, a folder with its TSVs")
    if study.test == "test":
        return source
    task, target = glue.TASKS[study.task], work / "final"
    target.mkdir(parents=True, exist_ok=True)
    copies = {"train.tsv": "train.tsv", task.dev: task.dev, task.test: task.dev}
    for name, copied in copies.items():
        run_folder.write_atomic(target / name, (source / copied).read_bytes())
    return target


def run_study(study, results, work, data_dir, jobs):
    """Make the runs that are missing; returns when all are on record.

    Raises:
        ValueError, OSError, RuntimeError: see read_study, check_lines; a run that failed.
        KeyboardInterrupt: after the runs under way have saved themselves.
    """
    source = task_folder(study, data_dir, work)
    labels, note = glue.load_test(study.task, source)
    if labels is None:
        raise ValueError(f"a study needs a test set with labels: {note}")
    labels = "".join(str(label) for _, label in labels)
    with run_folder.locked_file(results):
        dev = glue.TASKS[study.task].dev
        split_training_set(source, work / "tune", study.tune_pairs, study.split_seed, dev)
        folders = {"tune": (work / "tune").resolve(), "final": source.resolve()}
        make_missing(study, results, work, folders, labels, jobs)


def make_missing(study, results, work, folders, labels, jobs):
    """run_study, once the data are there and the results file is this process's own.

    Args:
        folders: dict phase -> folder with the task's files. labels: str, of the test set.
    """
    lines = compare_report.read_results(results, mend=True)
    check_lines(study, lines, results)
    if not any(line["phase"] == "labels" for line in lines):
        append(results, {"phase": "labels", "task": study.task, "labels": labels})
        lines = compare_report.read_results(results)
    if lines[0].get("labels") != labels:
        raise ValueError(
            f"{results} was made with another test set than {folders['final']}: use that one"
        )
    arms, active = {arm.name: arm for arm in study.arms}, {}
    finished = [line for line in lines if line["phase"] != "labels"]
    bar = tqdm(initial=len(finished), unit="run", smoothing=0, dynamic_ncols=True)
    try:
        while True:
            missing, later = missing_runs(study, lines)
            bar.total = len([r for r in lines if r["phase"] != "labels"]) + len(missing) + later
            bar.refresh()
            for run in missing:
                if len(active) >= jobs:
                    break
                if run not in active:
                    flags = flags_of(study, arms[run.arm])
                    folder = folder_of(run, flags, work)
                    process = start(study, run, flags, folder, folders[run.phase])
                    active[run] = (folder, process)
            if not active:
                return
            for run, (folder, process) in list(active.items()):
                if process.poll() is None:
                    continue
                line = line_after(study, arms[run.arm], run, folder, process.returncode)
                check_lines(study, [*lines, line], results)
                append(results, line)
                lines.append(json.loads(json.dumps(line)))
                del active[run]
                bar.update()
            time.sleep(0.2)
    finally:
        bar.close()
        for _, process in active.values():
            process.send_signal(signal.SIGTERM)
        for _, process in active.values():
            process.wait()


def line_after(study, arm, run, folder, returncode):
    """The line of a run whose process has ended. Raises RuntimeError where it failed."""
    text = folder.with_name(folder.name + ".log").read_text().strip()
    text = text.replace("\r", "\n").splitlines()
    line = line_of(study, arm, run, folder) if returncode == 0 else None
    if line is None:
        wrong = [t for t in text if t.startswith("train.py: ")] or text[-1:] or ["no output"]
        diverged = any(words in wrong[0] for words in DIVERGED)
        if returncode == 1 and run.phase == "tune" and diverged:
            return not_a_number(study, arm, run, wrong[0])
        raise RuntimeError(f"{folder.name} ended with exit code {returncode}: {wrong[0]}")
    return line


# --------------------------------------------------------------------------------------------- main


def main(argv=None):
    """Exit code: 0 done; 2 bad input, or a run that failed; 130 interrupted."""
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are missing")
    run.add_argument("study", type=Path, help="studies/NAME.toml")
    run.add_argument("--data-dir", type=Path, help="of the task; the embedded one needs none")
    run.add_argument("--jobs", type=number(int, 1), default=1, help="runs at a time (default: 1)")
    run.add_argument("--results", type=Path, help="default: results/NAME.jsonl")
    run.add_argument("--work", type=Path, help="run folders (default: runs/study-NAME)")
    report = commands.add_parser("report", help="table, verdicts and a picture, from the lines")
    report.add_argument("results", type=Path, help="results/NAME.jsonl")
    report.add_argument("--picture", type=Path, help="default: results/NAME.png")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = parser.parse_args(argv)
        if args.command == "report":
            lines = compare_report.read_results(args.results)
            print("\n".join(compare_report.report(lines)))
            picture = args.picture or args.results.with_suffix(".png")
            compare_report.draw(lines, picture)
            print(f"\n{picture}")
            return 0
        study = read_study(args.study)
        results = args.results or ROOT / "results" / f"{study.name}.jsonl"
        work = args.work or ROOT / "runs" / f"study-{study.name}"
        work.mkdir(parents=True, exist_ok=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        run_study(study, results, work, args.data_dir, args.jobs)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"compare.py: {one_line(error, 600)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
