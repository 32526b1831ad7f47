"""How the benchmarks measure: interleaved rounds, ratios of medians, peaks of fresh processes.

Times: one process; the arms take turns step by step, so that a machine whose speed drifts is fair
to all; round 0 warms up and is not counted. Memory: a fresh process for each arm,
whose peak is reset after loading.

What this file does not do: know what it measures.
"""

import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def interleaved(arms, rounds):
    """Seconds of every arm in every counted round.

    Args:
        arms: dict name -> list of functions without arguments, the steps of a round; the lists are
            equally long.
        rounds: int, counted rounds.

    Returns:
        dict name -> list of seconds.
    """
    seconds = {name: [] for name in arms}
    for i in range(rounds + 1):
        spent = dict.fromkeys(arms, 0.0)
        for steps in zip(*arms.values(), strict=True):
            for name, step in zip(arms, steps, strict=True):
                start = time.perf_counter()
                step()
                spent[name] += time.perf_counter() - start
        for name in arms if i else ():
            seconds[name].append(spent[name])
    return seconds


def ratio(numerator, denominator):
    """(ratio of the medians, smallest and largest ratio within a round) of two lists of seconds."""
    within = [a / b for a, b in zip(numerator, denominator, strict=True)]
    middle = statistics.median(numerator) / statistics.median(denominator)
    return middle, min(within), max(within)


def show(three, digits=2):
    middle, low, high = three
    return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def status(field):
    """A field of /proc/self/status in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_above(work):
    """MiB that work() needs above what is resident before it."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    work()
    return status("VmHWM") - before


def in_fresh_process(module, call):
    """float printed by `module.call` in a new Python process, e.g. ("bench_train", "peak('a')")."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {module}; "
    code += f"print({module}.{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module}.{call}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def conditions(rounds, *modules):
    """The line under every table: rounds, versions, threads."""
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, *modules))
    return (
        f"{rounds} counted rounds, interleaved, medians (smallest … largest); {versions}; Python "
        f"{platform.python_version()}; {torch.get_num_threads()} threads, float32, CPU"
    )


def bars(path, values, label, reference=None):
    """A bar for each name -> (value, low, high), and a line at `reference`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.45 * len(values)), layout="constrained")
    middles = [v[0] for v in values.values()]
    low = [max(0.0, v[0] - v[1]) for v in values.values()]
    high = [max(0.0, v[2] - v[0]) for v in values.values()]
    axes.barh(list(values), middles, xerr=[low, high], color="tab:blue", ecolor="black")
    if reference is not None:
        axes.axvline(reference, color="black", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(path, panels):
    """Panels (title, x label, y label, {name: (xs, ys)}), logarithmic both ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(panels) // 2
    figure, grid = plt.subplots(
        2, columns, figsize=(3.2 * columns, 5.6), layout="constrained", squeeze=False
    )
    for axes, (title, x_label, y_label, lines) in zip(grid.flat, panels, strict=True):
        for name, (xs, ys) in lines.items():
            axes.plot(xs, ys, "o-", label=name)
        axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        axes.set_xticks(xs, [str(x) for x in xs], minor=False)
        axes.minorticks_off()
    grid[0, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
