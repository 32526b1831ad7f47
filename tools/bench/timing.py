"""How the benchmarks take times: arms in turn, counted rounds, ratios of medians.

All arms run in one process and take turns step by step, so that a machine whose speed drifts is
fair to all of them. Round 0 warms up and is not counted. On one thread (OMP_NUM_THREADS=1) seconds
are the processor's, which other programs do not take away; on several they are the clock's.

What this file does not do: measure memory (peak.py), know what it measures.
"""

import platform
import statistics
import time

import torch


def interleaved(arms, rounds):
    """Seconds of every arm in every counted round.

    Args:
        arms: dict name -> list of functions without arguments, the steps of a round.
            The lists are equally long.
        rounds: int, counted rounds.

    Returns:
        dict name -> list of seconds.

    Raises:
        ValueError: lists of different length.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in arms}
    for i in range(rounds + 1):
        spent = dict.fromkeys(arms, 0.0)
        for steps in zip(*arms.values(), strict=True):
            for name, step in zip(arms, steps, strict=True):
                start = clock()
                step()
                spent[name] += clock() - start
        for name in arms if i else ():
            seconds[name].append(spent[name])
    return seconds


def spread(values):
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def ratio(numerator, denominator):
    """(ratio of the medians, smallest and largest ratio within a round) of two lists of seconds."""
    _, low, high = spread([a / b for a, b in zip(numerator, denominator, strict=True)])
    return statistics.median(numerator) / statistics.median(denominator), low, high


def show(three, digits=2):
    """(middle, low, high) as text."""
    middle, low, high = (f"{value:.{digits}f}" for value in three)
    return f"{middle} ({low} … {high})"


def rates(seconds, default, amount, unit):
    """How fast every arm is, and how it compares.

    Args:
        seconds: as interleaved gives them. default: the arm that the others are compared with.
        amount: how many of `unit` a round handles.

    Returns:
        (lines of a table, {arm: its speed beside the default's, as ratio gives it}).
    """
    ratios = {name: ratio(seconds[default], spent) for name, spent in seconds.items()}
    lines = [f"| arm | {unit}/s | against {default} |", "|---|---|---|"]
    for name, spent in seconds.items():
        rate = amount / statistics.median(spent)
        lines.append(f"| {name} | {rate:.{0 if rate > 100 else 1}f} | {show(ratios[name])} |")
    return lines, ratios


def refuse_few(task, examples, needed):
    """Raises ValueError where a benchmark would do less work than it divides by."""
    if len(examples) < needed:
        raise ValueError(
            f"{task} has {len(examples)} training examples, this benchmark needs {needed}: give "
            "another --task or --data-dir"
        )


def conditions(rounds, *modules, how="interleaved, ", threads=None, dtype="float32"):
    """The line under every table: rounds, versions, threads, by default of this process."""
    threads = threads or torch.get_num_threads()
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, *modules))
    return (
        f"{rounds} counted rounds, {how}medians (smallest … largest); {versions}; "
        f"Python {platform.python_version()}; {threads} threads, {dtype}, CPU"
    )
