"""The picture of two transformer blocks with the ten places of each: python tools/plot.py block

HeteroLoRA's search space (arXiv 2406.14956, Figure 1) as model.Block.forward computes it, post-LN
as in BERT. A row is a block, read from left to right; what leaves a block for the next one is the
residual stream and its FFN input, the two values that Block.forward returns.

What this file does not do: pre-LN, where each LN sits before its sub-layer and the places are the
same.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

LINEAR, RESIDUAL, CROSS, FIXED = "#bcd6f2", "#ffd59e", "#bfe3b4", "#f2f2f2"
PLACES = {  # name -> (x, y relative to the block's line, width, colour)
    "q_proj": (1.5, 0.64, 1.15, LINEAR),
    "k_proj": (1.5, 0.0, 1.15, LINEAR),
    "v_proj": (1.5, -0.64, 1.15, LINEAR),
    "out_proj": (4.45, 0.0, 1.25, LINEAR),
    "fc1": (8.85, 0.0, 0.8, LINEAR),
    "fc2": (10.75, 0.0, 0.8, LINEAR),
    "residual_1": (2.95, 1.5, 1.5, RESIDUAL),
    "residual_2": (9.8, 1.5, 1.5, RESIDUAL),
    "shortcut_sa": (2.95, -1.45, 1.7, CROSS),
    "shortcut_ffn": (7.1, 1.5, 1.7, CROSS),
}
FIXED_PARTS = {  # text -> (x, width)
    "attention": (2.95, 1.25),
    "LN": (6.15, 0.5),
    "act": (9.8, 0.6),
    "LN ": (12.35, 0.5),  # the second one
}
SUMS = (5.45, 6.9, 11.6, 13.1)  # after: attention, shortcut_ffn, feed-forward, shortcut_sa
SPLIT_SA, SPLIT_FFN, FFN_OUT = 0.45, 8.15, 7.6  # where the inputs of the two sub-layers branch off
LEFT, RIGHT, TOP, BOTTOM = -0.35, 13.55, 2.1, -2.0  # of a block's frame
PITCH = 5.0  # from one block's line to the next
LEGEND = (
    (LINEAR, "linear layer:  W x + s B A x,  W frozen"),
    (RESIDUAL, "residual:  x + s B A x"),
    (CROSS, "cross-layer shortcut:  s B A x"),
)
INK = {"color": "#333333", "linewidth": 1.2, "solid_capstyle": "round"}


def box(axes, x, y, width, height, text, colour, **style):
    frame = {"boxstyle": "round,pad=0,rounding_size=0.08", "edgecolor": "#333333"}
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, facecolor=colour, zorder=3, linewidth=1, **frame)
    )
    axes.text(x, y, text, ha="center", va="center", zorder=4, fontsize=10, **style)


def wire(axes, *points, arrow=True, over=False):
    """A line through the points, with a head at its end; over: a gap in what it crosses."""
    xs, ys = zip(*points, strict=True)
    if over:
        axes.plot(xs, ys, color="white", linewidth=6, zorder=1.4)
    axes.plot(xs, ys, zorder=1.5 if over else 1, **INK)
    if arrow:
        head = {"arrowstyle": "-|>", "color": INK["color"], "mutation_scale": 11}
        axes.annotate("", points[-1], points[-2], arrowprops={**head, "shrinkA": 0, "shrinkB": 0})


def note(axes, x, y, text, **style):
    axes.text(x, y, text, fontsize=9, color="#555555", **{"va": "center", **style})


def block(axes, y, title):
    """One block on the line y; what enters and leaves it is drawn by picture()."""
    size = (RIGHT - LEFT, TOP - BOTTOM)
    axes.add_patch(
        Rectangle((LEFT, y + BOTTOM), *size, facecolor="white", edgecolor="#999999", zorder=0.5)
    )
    axes.text(LEFT + 0.12, y + TOP - 0.15, title, va="top", fontsize=11, weight="bold")
    for place, (x, dy, width, colour) in PLACES.items():
        box(axes, x, y + dy, width, 0.5, place, colour, family="monospace")
    for text, (x, width) in FIXED_PARTS.items():
        box(axes, x, y, width, 0.5 if width < 1 else 1.78, text.strip(), FIXED)
    sa, after_ffn, feed_forward, end = SUMS
    for x in SUMS:
        axes.add_patch(Circle((x, y), 0.17, facecolor="white", edgecolor="#333333", zorder=3))
        axes.text(x, y, "+", ha="center", va="center_baseline", zorder=4, fontsize=12)
    for place in ("q_proj", "k_proj", "v_proj"):
        x, dy, width, _ = PLACES[place]
        start = [(SPLIT_SA, y), (0.7, y)] if not dy else [(0.7, y), (0.7, y + dy)]
        wire(axes, *start, (x - width / 2, y + dy))
        wire(axes, (x + width / 2, y + dy), (2.325, y + dy))
    line = [3.575, 3.825, 5.075, sa - 0.17, sa + 0.17, 5.9, 6.4, after_ffn - 0.17]
    line += [after_ffn + 0.17, 8.45, 9.25, 9.5, 10.1, 10.35, 11.15, feed_forward - 0.17]
    line += [feed_forward + 0.17, 12.1, 12.6, end - 0.17]
    for start, stop in zip(line[::2], line[1::2], strict=True):
        wire(axes, (start, y), (stop, y))
    top, low = y + 1.5, y - 1.45
    for split, place, sum_ in (
        (SPLIT_SA, "residual_1", sa),
        (SPLIT_FFN, "residual_2", feed_forward),
    ):
        x, _, width, _ = PLACES[place]
        wire(axes, (split, y), (split, top), (x - width / 2, top))
        wire(axes, (x + width / 2, top), (sum_, top), (sum_, y + 0.17))
    x, _, width, _ = PLACES["shortcut_sa"]
    wire(axes, (SPLIT_SA, y), (SPLIT_SA, low), (x - width / 2, low))
    wire(axes, (x + width / 2, low), (end, low), (end, y - 0.17))
    wire(axes, (after_ffn, top - 0.25), (after_ffn, y + 0.17))
    for x in (SPLIT_SA, SPLIT_FFN, FFN_OUT):
        axes.plot(x, y, "o", color=INK["color"], markersize=4, zorder=3)
    note(axes, FFN_OUT + 0.15, y - 0.55, "FFN input")
    note(axes, SPLIT_SA - 0.05, low - 0.3, "attention input")


def picture(path):
    """Draw blocks i and i + 1, and what feeds what, to a PNG."""
    figure, axes = plt.subplots(figsize=(11, 8.1))
    axes.set(xlim=(-1.15, 14.4), ylim=(-8.75, 2.95))
    axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995)
    first, second, end = 0.0, -PITCH, SUMS[-1] + 0.17
    block(axes, first, "block i")
    block(axes, second, "block i + 1")
    # the residual stream
    turn = first + (BOTTOM + TOP - PITCH) / 2
    wire(axes, (-1.0, first), (SPLIT_SA, first), arrow=False)
    wire(axes, (end, first), (14.1, first), (14.1, turn), (-0.8, turn), (-0.8, second), arrow=False)
    wire(axes, (-0.8, second), (SPLIT_SA, second), arrow=False)
    wire(axes, (end, second), (14.2, second))
    note(axes, -1.0, first + 0.25, "x")
    note(axes, 0.0, turn + 0.2, "x, the residual stream: attention input of block i + 1")
    below = second + BOTTOM - 0.33
    note(axes, RIGHT, below, "x: to block i + 2; of the last block: to the head", ha="right")
    # the FFN input of a block
    enter = PLACES["shortcut_ffn"][1] + 0.25
    wire(axes, (FFN_OUT, first + 2.75), (FFN_OUT, first + enter))
    note(axes, FFN_OUT + 0.15, first + 2.6, "FFN input of block i − 1 (block 0 has none)")
    wire(axes, (FFN_OUT, first), (FFN_OUT, second + enter), over=True)
    note(axes, FFN_OUT + 0.15, turn + 0.2, "FFN input of block i")
    wire(axes, (FFN_OUT, second), (FFN_OUT, second + BOTTOM - 0.5), over=True)
    note(axes, FFN_OUT - 0.15, below, "FFN input: to block i + 2", ha="right")
    for i, (colour, text) in enumerate(LEGEND):
        x = (0.0, 5.6, 9.6)[i]
        box(axes, x, -8.3, 0.45, 0.3, "", colour)
        axes.text(x + 0.4, -8.3, text, va="center", fontsize=10)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    return path
