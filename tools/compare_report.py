"""What a study's lines say: table, intervals, verdicts, picture (compare.py report).

Differences are paired: arm minus control, seed by seed, on the same test pairs, in points of
accuracy. Two intervals of 95 % stand beside each:

    over seeds               mean +- t(n - 1) sd / sqrt(n), n seeds; the test set is taken as given
    over seeds and examples  the 2.5 and 97.5 % quantiles of 10,000 resampled means, seeds and test
                             pairs drawn anew with replacement, each pair for all seeds alike

The second errs on the side of caution about what is neither the seed's nor the pair's. Its variance
is about s^2/n + e^2/m + 3 i^2/(n m), of n seeds and m test pairs, where the mean itself has
s^2/n + e^2/m + i^2/(n m): s is the spread of seeds, e of test pairs, i of what is neither (Owen
2007, "The pigeonhole bootstrap"). Where the spread of seeds is all there is, it is too narrow
instead: by sqrt((n - 1) / n) and the normal quantile, for n = 10 by 18 %; there the first interval
is the wider one, and a verdict needs both. Both take the learning rate as given.

The verdict: "no difference" if both intervals lie within +- MARGIN points, else "a difference" if
both exclude 0, else "not decided". There is none before SEEDS seeds, so that nobody stops at what
he likes; and none in a study for orientation: of many differences some exclude 0 by chance.

What this file does not do: make runs (compare.py).
"""

import json
import math
import os

import numpy as np

from support.form import count, finite, misfit

MARGIN = 1.0  # points of test accuracy
SEEDS = 10  # of a difference that is judged
DRAWS = 10_000


def metrics(value):
    return type(value) is dict and finite(value.get("accuracy"))


def epochs(value):
    return type(value) is list and len(value) > 0 and all(map(metrics, value))


def counts(value):
    return type(value) is dict and count(value.get("adapters"))


# What is read of a line, by its phase; a line may say more. form.py has the meaning of the forms.
LABELS = {"labels": str}
TUNE = {"arm": str, "lr": finite, "seed": count, "flags": str, "dev": [metrics]}
RESULT = {"dev": epochs, "test": metrics, "predictions": str, "trainable": counts}
FINAL = {**TUNE, **RESULT, "space": str, "controls": [str]}
FORMS = {"labels": LABELS, "tune": TUNE, "final": FINAL}


def read_results(path, mend=False):
    """The lines of a results file; a last line that a crash cut short is left out.

    Args:
        path: results/NAME.jsonl.
        mend: bool, take the torn line out of the file, so that it can be appended to. A file that
            is not there yet has no lines then.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line that is no line of a study, or a run that is there twice.
    """
    if not path.is_file():
        if not mend:
            raise FileNotFoundError(f"no results at {path}: make some with compare.py run")
        return []
    whole, _, torn = path.read_text().rpartition("\n")
    if torn and mend:
        os.truncate(path, path.stat().st_size - len(torn.encode()))
    lines, seen = [], {}
    for number, text in enumerate(whole.split("\n") if whole else [], 1):
        try:
            line = json.loads(text)
            form = FORMS[line["phase"]]
            wrong = misfit({name: line[name] for name in form}, form)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wrong = repr(error)
        if wrong:
            raise ValueError(f"{path}:{number} is no line of a study: {wrong}")
        key = line["phase"], line.get("arm"), line.get("lr"), line.get("seed")
        if key in seen:
            raise ValueError(f"{path}:{number} is the run of line {seen[key]} again: take one away")
        seen[key] = number
        lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------- intervals


def t_quantile(df):
    """The 97.5 % quantile of Student's t, df >= 1, by bisection on its density's integral."""
    constant = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    angle = np.linspace(0, 1, 20_001)  # x = q u, u from 0 to 1

    def half_mass(q):  # integral of the density from 0 to q
        return q * np.trapezoid(constant * (1 + (q * angle) ** 2 / df) ** (-(df + 1) / 2), angle)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if half_mass(middle) < 0.475 else (low, middle)
    return low


def over_seeds(differences):
    """(low, high): mean +- t sd / sqrt(n) of n paired differences; infinite for one seed."""
    n = len(differences)
    if n < 2:
        return -math.inf, math.inf
    half = t_quantile(n - 1) * np.std(differences, ddof=1) / math.sqrt(n)
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def over_seeds_and_examples(differences, draws=DRAWS, seed=0):
    """(low, high): quantiles of resampled means, rows (seeds) and columns (examples) resampled.

    Args:
        differences: (n, m), of n seeds and m examples: arm right minus control right, -1, 0 or 1.
        draws: how many means. seed: of the resampling.
    """
    n, m = differences.shape
    rng = np.random.default_rng(seed)
    # Examples on which the seeds differ alike are one cell: (n, c) patterns, (c,) how many of each.
    patterns, counts = np.unique(differences, axis=1, return_counts=True)
    rows = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n  # (draws, n)
    columns = rng.multinomial(m, counts / m, size=draws) / m  # (draws, c)
    means = ((rows @ patterns) * columns).sum(1)  # (draws,)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def verdict(*intervals):
    """The fixed words, from intervals in points of accuracy."""
    if all(low >= -MARGIN and high <= MARGIN for low, high in intervals):
        return "no difference"
    if all(low > 0 or high < 0 for low, high in intervals):
        return "a difference"
    return "not decided"


# ------------------------------------------------------------------------------------------- tables


def finals(lines):
    """{arm: {seed: line}} of the final runs, arms in the order in which they first finished."""
    found = {}
    for line in lines:
        if line["phase"] == "final":
            runs = found.setdefault(line["arm"], {})
            if runs and first(runs)["lr"] != line["lr"]:
                raise ValueError(
                    f"arm {line['arm']!r} has final runs at lr {first(runs)['lr']:g} and at "
                    f"{line['lr']:g}: its rate was frozen, take the lines of one of them away"
                )
            runs[line["seed"]] = line
    return found


def right(line, labels):
    """(m,) 1 where the prediction on a test example is right, else 0.

    Raises:
        ValueError: not as many as labels, or their mean is not the accuracy of the line.
    """
    predictions = np.frombuffer(line["predictions"].encode(), np.uint8)
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} test labels")
    found, told = (predictions == labels).astype(np.float64), line["test"]["accuracy"]
    if abs(found.mean() - told) > 1e-6:
        raise ValueError(
            f"arm {line['arm']!r} seed {line['seed']}: its predictions have accuracy "
            f"{found.mean():.6f}, the line says {told:.6f}: one of them was changed"
        )
    return found


def spread(values):
    """Mean ± sd in points."""
    sd = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{sd}"


def interval(low, high):
    return f"{low:+.1f} … {high:+.1f}" if math.isfinite(low) else "–"


def span(numbers):
    """Of an arm's runs: one number, or least … most; – where a line of a run has none."""
    if None in numbers:
        return "–"
    return " … ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def compared(arm, control, labels):
    """Paired differences of two arms' finals {seed: line}, on the seeds that both have.

    Returns:
        (number of seeds, mean in points, interval over seeds, interval over both).
    """
    seeds = sorted(set(arm) & set(control))
    matrix = np.array([right(arm[s], labels) - right(control[s], labels) for s in seeds])  # (n, m)
    per_seed = 100 * matrix.mean(1)  # (n,)
    both = tuple(100 * x for x in over_seeds_and_examples(matrix))
    return len(seeds), float(per_seed.mean()), over_seeds(per_seed), both


def reported(arms):
    """What the final runs are reported on: "test"; or "dev", where the two are the same set."""
    runs = [line for found in arms.values() for line in found.values()]
    same = all(line["test"] == {k: line["dev"][-1].get(k) for k in line["test"]} for line in runs)
    return "dev" if same else "test"


def report(lines):
    """The report as lines of Markdown: one table of arms, one of differences, for each space."""
    arms = finals(lines)
    on = reported(arms)
    labels = next((line["labels"] for line in lines if line["phase"] == "labels"), "")
    labels = np.frombuffer(labels.encode(), np.uint8)
    result = []
    for space in dict.fromkeys(first(found)["space"] for found in arms.values()):
        here = {name: found for name, found in arms.items() if first(found)["space"] == space}
        result += [f"### {space}", ""]
        apart = on == "test"
        heads = "| arm | trainable at once | stored | lr | seeds | dev, mean ± sd |"
        result += [heads + " test, mean ± sd |" * apart]
        result += ["|---|---|---|---|---|---|" + "---|" * apart]
        for name, found in here.items():
            dev = spread([line["dev"][-1]["accuracy"] for line in found.values()])
            test = spread([line["test"]["accuracy"] for line in found.values()])
            count = span([line["trainable"]["adapters"] for line in found.values()])
            kept, lr = span([line.get("stored") for line in found.values()]), first(found)["lr"]
            row = f"| {name} | {count} | {kept} | {lr:g} | {len(found)} | {dev} |"
            result += [row + f" {test} |" * apart]
        rows, judged = [], first(first(here)).get("verdicts", True)
        for name, found in here.items():
            for control in first(found)["controls"]:
                if not set(found) & set(arms.get(control, {})):
                    continue
                n, mean, seeds, both = compared(found, arms[control], labels)
                words = verdict(seeds, both) if n >= SEEDS else f"at {SEEDS} seeds"
                rows += [
                    f"| {name} − {control} | {n} | {mean:+.1f} | {interval(*seeds)} | "
                    f"{interval(*both)} |" + f" {words} |" * judged
                ]
        if rows:
            result += [
                "",
                f"| difference in {on} accuracy, points | seeds | mean | 95 % over seeds "
                "| 95 % over seeds and examples |" + " verdict |" * judged,
                "|---|---|---|---|---|" + "---|" * judged,
            ]
            result += [*rows]
        result += [""]
    tuned = sum(line["phase"] == "tune" for line in lines)
    total = sum(len(found) for found in arms.values())
    whole = [line["commit"] for line in lines if line.get("commit")]
    commits = dict.fromkeys(commit[:7] + "+changes" * ("+" in commit) for commit in whole)
    made = f"; commit{'s' * (len(commits) > 1)} {', '.join(commits)}" if commits else ""
    return [*result, f"{total} final runs, {tuned} tune runs{made}."]


def first(found):
    return next(iter(found.values()))


# ------------------------------------------------------------------------------------------ picture


def draw(lines, path):
    """Every final run a dot at its accuracy, one row an arm, its mean a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = finals(lines)
    names = sorted(arms, key=lambda n: (first(arms[n])["space"], list(arms).index(n)))
    spaces = list(dict.fromkeys(first(arms[n])["space"] for n in names))
    height = 1.2 + 0.32 * len(names) + 0.2 * len(spaces)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    for row, name in enumerate(names):
        values = [100 * line["test"]["accuracy"] for line in arms[name].values()]
        colour = f"C{spaces.index(first(arms[name])['space'])}"
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], "-", color="black")
    counts = [span([x["trainable"]["adapters"] for x in arms[n].values()]) for n in names]
    labels = [f"{n}  ({count})" for n, count in zip(names, counts, strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color="lightgrey")
    axes.set_xlabel(
        f"{reported(arms)} accuracy after the last epoch, %: a dot a run, a bar the mean"
    )
    for i, space in enumerate(spaces):
        axes.plot([], [], "o", color=f"C{i}", label=space)
    if spaces:
        figure.legend(fontsize=8, loc="outside lower center")  # over no dot
    figure.savefig(path, dpi=150)
    plt.close(figure)
