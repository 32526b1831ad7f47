"""Pictures of a run, and of a block: python tools/plot.py RUN, python tools/plot.py block

    RUN that allocated     RUN/allocation.png   what HeteroLoRA decided, module by module
    RUN with Delta-LoRA    RUN/delta.png        ||W_t - W_0||_F over the steps, and the singular
                                                values of W_T - W_0
    block                  docs/block.png       two blocks with their ten places (plot_block.py)

allocation.png: one row per module, grouped by place, with its block and how often it was on; one
column per decision, with its step below. Dark = on (or the share of its ranks that is on), light =
off. A static allocation has one decision: blocks across, places down.

delta.png: the run's adapter.safetensors holds scaling B A of rank <= 2r on W_0, the whole result of
Delta-LoRA (delta_lora.DeltaLoRA.export), and its checkpoint.pt the pair that the forward pass adds:

    W_T - W_0 = exported B' A' - s B_T A_T

What this file does not do: train, decide.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import safetensors
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import checkpoint, run_folder
from support.errors import one_line
from support.flags import Parser
from tools import plot_block

ROOT = Path(__file__).resolve().parents[1]
ZERO = 1e-10  # of the largest singular value: what is below is rounding
FLOOR = 1e-12  # of the largest singular value: what is below is drawn here
DAMAGED = (KeyError, TypeError, IndexError, AttributeError, ArithmeticError)  # of a file's content

# --------------------------------------------------------------------------------------- allocation


def level(value, r):
    """true/false, or a list of ranks -> 0 … 1."""
    return len(value) / r if isinstance(value, list) else float(value)


def by_place(names):
    """(places, names sorted by place in order of first appearance, then by block)."""
    places = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return places, [n for p in places for n in names if n.rpartition(".")[2] == p]


def over_time(axes, history, r):
    """Heat map (modules, decisions), and how often each module was on."""
    places, names = by_place(list(history[0]["on"]))
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


def over_blocks(axes, decision, r):
    """Heat map (places, blocks) of one decision."""
    places, names = by_place(list(decision["on"]))
    blocks = 1 + max(int(n.split(".")[1]) for n in names)
    matrix = np.full((len(places), blocks), np.nan)
    for name in names:
        i, place = int(name.split(".")[1]), name.rpartition(".")[2]
        matrix[places.index(place), i] = level(decision["on"][name], r)
    axes.imshow(matrix, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(places)), places)
    axes.set_xticks(range(blocks), range(blocks))
    axes.set_xlabel("block")
    axes.set_xticks(np.arange(blocks + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(places) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="lightgrey")
    axes.tick_params(which="minor", length=0)


def allocation(folder, path):
    """Draw RUN/allocation.json to the PNG `path`.

    Raises:
        ValueError: not an allocation.json.
    """
    source = folder / "allocation.json"
    try:
        content = run_folder.read_json(source)
        r = run_folder.read_config(folder)["r"]
        history, budget = content["history"], content["budget"]
        limit = ", ".join(f"{k} {v}" for k, v in budget.items())
        title = f"{content['mode']} {content['proxy']}, {limit}"
        rows, first = len(history[0]["on"]), history[0]["on"].values()
        by_rank = any(isinstance(value, list) for value in first)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{source} is not a run's allocation.json: {error!r}") from error
    dynamic = len(history) > 1
    size = (8, 1.5 + 0.14 * rows) if dynamic else (7, 3.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    if dynamic:
        over_time(axes, history, r)
        what = "its ranks, over the decisions," if by_rank else "decisions in which it"
        title += f"\n(rows: block, share of {what} {'that were' if by_rank else 'was'} on)"
    else:
        over_blocks(axes, history[0], r)
    axes.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --------------------------------------------------------------------------------------- Delta-LoRA


def weight_changes(folder):
    """(steps, {module: [||W_t - W_0||_F of each]}) from the log of a run.

    Raises:
        ValueError: no line of the log says it.
    """
    lines = [line for line in run_folder.read_log(folder) if "weight_change" in line]
    if not lines:
        raise ValueError(
            f"{folder}/metrics.jsonl has no train line with a weight_change: train with a smaller "
            "--log-every"
        )
    modules = lines[0]["weight_change"]
    return [line["step"] for line in lines], {
        name: [line["weight_change"][name] for line in lines] for name in modules
    }


def factored_change(folder, flags):
    """{module: (left (out, k), right (k, in))} in float64, left right = W_T - W_0.

    left right = [B', -s B_T] [A'; A_T]; the second term is what the branch adds itself: the ranks
    that are on at the end, of a module that is off and frozen all of them, of one that is out none.

    Raises:
        OSError, ValueError: the run is not finished, or a file is damaged.
    """
    path = folder / "adapter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no adapter.safetensors: finish the run (--resume)")
    adapter = safetensors.torch.load_file(path)
    state = checkpoint.read(folder / "checkpoint.pt")
    found = {}
    for name in state["delta"]["ended"]:  # the modules with a weight that can move
        pair = (f"{name}.lora_A", f"{name}.lora_B")
        A, B = (adapter[key].double() for key in pair)  # (R, in), (out, R), scale 1
        frozen = flags.get("when_off") == "frozen"
        if state["on"][name] or frozen:
            now_A, now_B = (state["parameters"][key].double() for key in pair)
            off = [] if frozen else state["ranks_off"].get(name, [])
            ranks = [k for k in range(len(now_A)) if k not in off]
            now_A, now_B = now_A[ranks], now_B[:, ranks]
            A = torch.cat([A, now_A])  # (R + r, in)
            B = torch.cat([B, -flags["lora_alpha"] / flags["r"] * now_B], 1)  # (out, R + r)
        found[name] = (B, A)
    return found


def singular_values(left, right):
    """Of left right, (out, k) (k, in): those that its factors allow, k at most; the rest are 0.

    left = Q R, right^T = P S with orthonormal columns of Q and P: left right = Q (R S^T) P^T.
    """
    return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T)


def delta(folder, flags, path):
    """Draw what Delta-LoRA did to the weights of a finished run to the PNG `path`.

    Raises:
        OSError, ValueError: see weight_changes, factored_change.
    """
    start, rank = flags["delta_start"], 2 * flags["r"]
    steps, changes = weight_changes(folder)
    values = {name: singular_values(*f) for name, f in factored_change(folder, flags).items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    places = list(dict.fromkeys(name.rpartition(".")[2] for name in changes))
    colours = {place: f"C{i}" for i, place in enumerate(places)}
    labels = set()
    for name, norms in changes.items():
        place = name.rpartition(".")[2]
        style = {"color": colours[place], "linewidth": 1, "alpha": 0.8}
        left.plot(steps, norms, label="" if place in labels else place, **style)
        labels.add(place)
        if len(values[name]) and values[name][0] > 0:
            shown = values[name].clamp(min=FLOOR * values[name][0]).tolist()
            right.plot(range(1, 1 + len(shown)), shown, ".-", markersize=4, **style)
    left.axvline(start, color="black", linestyle=":")
    left.set(xlabel="step", ylabel="||W_t − W_0||_F", xlim=(min(0, start), steps[-1]))
    left.set_title(f"W first moves after step K + 2 (dotted: K = {start})")
    left.legend(loc="upper left")
    right.axvline(rank + 0.5, color="black", linestyle=":")
    most = max(int((v > ZERO * v[:1].sum()).sum()) for v in values.values())
    right.set(xlabel="singular value of W_T − W_0, sorted", yscale="log")
    right.set_title(f"at most {most} are not zero (dotted: 2r = {rank})")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --------------------------------------------------------------------------------------------- main


def draw(folder, out=None):
    """All pictures of a run, beside its files or, a single one, to the path `out`; their paths.

    Raises:
        FileNotFoundError: no run, or nothing to draw. ValueError: a file of the run that is
            damaged, or two pictures and one path.
    """
    flags = run_folder.read_config(folder)
    kinds = []
    if (folder / "allocation.json").is_file():
        kinds.append("allocation")
    if flags.get("delta_ratio"):
        kinds.append("delta")
    if not kinds:
        raise FileNotFoundError(f"{folder} has nothing to draw: it allocated nothing, W stayed")
    if out and len(kinds) > 1:
        raise ValueError(f"{folder} has two pictures, {' and '.join(kinds)}: leave out --out")
    paths = {kind: out or folder / f"{kind}.png" for kind in kinds}
    try:
        if "delta" in paths:  # first: it needs a finished run
            delta(folder, flags, paths["delta"])
        if "allocation" in paths:
            allocation(folder, paths["allocation"])
    except (*DAMAGED, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} is damaged, a file of it does not fit: {error!r}") from error
    return list(paths.values())


def main(argv=None):
    """Exit code: 0 done, 2 bad input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a run folder, or the word block")
    parser.add_argument("--out", type=Path, help="path of the PNG")
    try:
        args = parser.parse_args(argv)
        if args.out and args.out.suffix != ".png":
            raise ValueError(f"--out is {args.out}, expected a name that ends in .png")
        if args.what == "block":
            paths = [plot_block.picture(args.out or ROOT / "docs" / "block.png")]
        else:
            paths = draw(Path(args.what), args.out)
    except (ValueError, OSError) as error:
        print(f"plot.py: {one_line(error, 600)}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
