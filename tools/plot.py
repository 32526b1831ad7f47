"""Draw what a HeteroLoRA run decided: python tools/plot.py RUN  ->  RUN/allocation.png

One row per module, grouped by type, with its layer and how often it was on; one column per
decision, with its step below. Dark = on (or the share of its ranks that is on), light = off. A
static allocation has one decision: layers across, types down.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np


def level(value, r):
    """true/false, or a list of ranks -> 0 … 1."""
    return len(value) / r if isinstance(value, list) else float(value)


def by_type(names):
    """Names sorted by type of module, in order of first appearance, then by layer."""
    places = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return places, [n for p in places for n in names if n.rpartition(".")[2] == p]


def over_time(axes, history, r):
    """Heat map (modules, decisions), and how often each module was on."""
    places, names = by_type(list(history[0]["on"]))
    matrix = np.array([[level(h["on"][name], r) for h in history] for name in names])
    axes.imshow(matrix, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    labels = [f"{n.split('.')[1]}   {matrix[i].mean():4.0%}" for i, n in enumerate(names)]
    axes.set_yticks(range(len(names)), labels, fontsize=6)
    shown = np.unique(np.linspace(0, len(history) - 1, min(len(history), 12)).astype(int))
    axes.set_xticks(shown, [history[i]["step"] for i in shown], fontsize=8)
    axes.set_xlabel("decision before step")
    start = 0
    for place in places:
        size = sum(n.rpartition(".")[2] == place for n in names)
        middle = start + (size - 1) / 2
        transform = axes.get_yaxis_transform()
        axes.text(-0.1, middle, place, ha="right", va="center", fontsize=8, transform=transform)
        start += size
        if start < len(names):
            axes.axhline(start - 0.5, color="black", linewidth=0.8)


def over_layers(axes, decision, r):
    """Heat map (types, layers) of one decision."""
    places, names = by_type(list(decision["on"]))
    layers = 1 + max(int(n.split(".")[1]) for n in names)
    matrix = np.full((len(places), layers), np.nan)
    for name in names:
        i, place = int(name.split(".")[1]), name.rpartition(".")[2]
        matrix[places.index(place), i] = level(decision["on"][name], r)
    axes.imshow(matrix, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(places)), places)
    axes.set_xticks(range(layers), range(layers))
    axes.set_xlabel("layer")
    axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(places) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="lightgrey")
    axes.tick_params(which="minor", length=0)


def draw(folder):
    """Read RUN/allocation.json and write RUN/allocation.png; returns the path.

    Raises:
        FileNotFoundError: the run allocated nothing. ValueError: not an allocation.json.
    """
    path = folder / "allocation.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no allocation.json: its run allocated nothing")
    try:
        content = json.loads(path.read_text())
        r = json.loads((folder / "config.json").read_text())["flags"]["r"]
        history, budget = content["history"], content["budget"]
        limit = ", ".join(f"{k} {v}" for k, v in budget.items())
        title = f"{content['mode']} {content['proxy']}, {limit}"
        rows = len(history[0]["on"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a run's allocation.json: {error!r}") from error
    dynamic = len(history) > 1
    size = (8, 1.5 + 0.14 * rows) if dynamic else (7, 3.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    if dynamic:
        over_time(axes, history, r)
    else:
        over_layers(axes, history[0], r)
    axes.set_title(
        f"{title}\n(rows: layer, share of decisions in which it was on)" if dynamic else title
    )
    figure.savefig(folder / "allocation.png", dpi=150)
    plt.close(figure)
    return folder / "allocation.png"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    args = parser.parse_args(argv)
    try:
        print(draw(args.run))
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
