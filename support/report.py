"""What a run says at its end: numbers in, lines of text out.

What this file does not do: measure anything (evaluation.py), draw (tools/plot.py).
"""

import shlex


def show(metrics):
    """Metrics in one line; the epoch, where there is one, is left out."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "epoch")


def table(
    *,
    method,
    adapters,
    stored,
    head,
    last,
    best,
    test,
    seconds,
    score_seconds,
    decisions,
    folder,
    control,
    baselines,
    untouched=None,
):
    """The last lines of a run.

    Args:
        method: str, the method in one line.
        adapters, head: int, trainable parameters. stored: int, those of adapters with what is off
            but has learned.
        last, best, test: dicts of metrics, test may be None; best holds its epoch.
        seconds, score_seconds: float, of the run, and of these for decisions.
        decisions: int, 0 where nothing is allocated.
        folder: the run folder.
        control: (command, parameters) of the run to compare with, or None.
        baselines: dict name -> accuracy on the same data; may be empty.
        untouched: metrics of the model before the first step, or None.
    """
    words = f"{seconds:.1f}"
    if decisions:
        share = score_seconds / max(seconds, 1e-9)
        words += f", {score_seconds:.1f} of them ({share:.0%}) for decisions"
    kept = f"{stored:,} in adapters: what is on, and what has learned and is off"
    rows = {  # a row without a value is left out
        "method": method,
        "trainable": f"{adapters:,} in adapters + {head:,} in the head",
        "stored": kept if stored != adapters else "",
        "untouched": show(untouched or {}),
        "final": show(last),
        "best": f"{show(best)} (epoch {best['epoch']})",
        "beside it": ", ".join(f"{name} {value:.3f}" for name, value in baselines.items()),
        "test": show(test or {}),
        "seconds": words,
        "decisions": f"{decisions}; python tools/plot.py {shlex.quote(str(folder))}"
        if decisions
        else "",
        "run folder": str(folder),
    }
    lines = [f"{name:<12}{value}" for name, value in rows.items() if value]
    if control:
        command, parameters = control
        lines += [f"the same budget, spread evenly ({parameters:,} parameters):", f"  {command}"]
    return "\n".join(lines)
