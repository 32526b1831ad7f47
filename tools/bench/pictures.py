"""The benchmarks' pictures: bars with a range, and curves on logarithmic axes.

What this file does not do: measure anything.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def bars(path, values, label, reference=None):
    """A horizontal bar for each name, with its range, and a line at `reference`.

    Args:
        path: of the PNG.
        values: dict name -> (value, low, high).
        label: str, of the axis.
        reference: float, or None for no line.
    """
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
    """Two rows of panels, logarithmic both ways.

    Args:
        path: of the PNG.
        panels: list of (x label, y label, {name: (xs, ys)}), the upper row first.
    """
    columns = len(panels) // 2
    figure, grid = plt.subplots(
        2, columns, figsize=(3.2 * columns, 5.6), layout="constrained", squeeze=False
    )
    for axes, (x_label, y_label, lines) in zip(grid.flat, panels, strict=True):
        for name, (xs, ys) in lines.items():
            axes.plot(xs, ys, "o-", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        axes.set_xticks(xs, [str(x) for x in xs], minor=False)
        axes.minorticks_off()
    grid[0, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
