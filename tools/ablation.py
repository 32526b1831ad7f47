"""Do the scores mean anything? The ranking of each proxy against the modules' measured importance.

    python tools/ablation.py run --data-dir DIR                adds lines to results/ablation.jsonl
    python tools/ablation.py report results/ablation.jsonl     tables, and a picture beside the file

Plain LoRA is trained with every module on, in two spaces, and looked at in three moments. Each time
every proxy scores the modules, and each module's importance is measured:

    space A    q_proj, v_proj of every block, r 8, alpha 16 (MiniLM: 12 modules)
    space B    the same and all four shortcuts, shortcut_alpha 4 (MiniLM: 35 modules)

    moment     | importance of a module
    start      | B = 0, so switching off changes nothing: how far the mean training loss falls when
               | this module alone is trained for --steps steps
    third, end | how far the mean loss on the tuning dev part rises when this module alone is off

At the start the head is trained first, alone, for --steps steps, and frozen: from there every
module goes by itself, with a fresh optimizer, at one constant learning rate, over the same batches,
whose mean loss before and after is what is compared. So the module is all that differs.

Data: MRPC's train.tsv, shuffled by random.Random(20261124); the first --dev examples are the tuning
dev part, the rest trains. GLUE's own dev set is not used.

Training: 3 epochs, batch 16, AdamW, lr 1e-3, 30 steps of warm-up, then linear to 0. Scores come
from the batches that train.py scores, the first 4 of 16 examples. ALPHA-TEST, which costs two steps
a batch and module, sees every second of them: without that it would take a third of the time. A
seed of both spaces took 44 to 78 minutes, one thread on a shared machine.

A line of the file is one (space, seed, moment), written when it is complete. The same command goes
on after an interruption: what is in the file is not measured again, but the training that leads to
the next moment is repeated.

At the start GRAD-NORM is close to the importance by its nature. B is 0, and AdamW's steps move each
of its entries by about the same amount, so that the loss falls by about the rate times the sum of
|dL/dB| over the entries; the score is the root of the sum of their squares, before the head was
warmed up, and on other batches. What is told there is that a gradient foretells a short training
run. Whether a score foretells worth is told by the other columns, and beside them by the importance
in another seed's run.

What this file does not do: say which choice trains better (compare.py); prove a cause: a module
that is switched off after training is missed by the others, which were trained beside it.
"""

import contextlib
import json
import math
import os
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import allocate
import lora
import proxies
import train
from support import flags, glue, run_folder
from support import run as runs
from support.errors import one_line
from support.form import count, finite, misfit
from tools import compare_report

SPACES = {"A": "none", "B": "all"}  # --shortcuts of train.py
MOMENTS = ("start", "third", "end")
COLUMNS = (*((m, m) for m in MOMENTS), ("start", "end"))  # (moment scored, moment measured)
TRAINING = "--allocate none --epochs 3 --batch-size 16 --schedule linear --warmup 30 --lr 1e-3"
EVAL_BATCH = 32
SPLIT_SEED = 20261124
DRAWS = 1000  # of random scores, in the report
QUARTER = 0.25


# ---------------------------------------------------------------------------------- what is trained


def prepare(args, space, seed):
    """A Run of train.py with the tuning split in the place of GLUE's."""
    argv = f"{TRAINING} --task mrpc --device cpu --seed {seed} --shortcuts {SPACES[space]}".split()
    argv += ["--model", args.model]
    argv += ["--data-dir", args.data_dir] if args.data_dir else []
    run = train.set_up(flags.parse_flags(argv))
    run.args.score_batches = args.score_batches  # a run that allocates nothing has no such flag
    run.dev, run.train = tuning_split(run.train, args.dev)
    needed = 2 * args.steps * run.args.batch_size
    if len(run.train) < needed:
        raise ValueError(
            f"{len(run.train)} examples are left to train, --steps {args.steps} needs {needed}: "
            "lower --steps or --dev"
        )
    return run


def tuning_split(examples, dev):
    """(tuning dev part, the rest) of the examples of train.tsv, in the order of the file."""
    if dev >= len(examples):
        raise ValueError(f"--dev is {dev}, allowed: less than the {len(examples)} of train.tsv")
    examples = list(examples)
    random.Random(SPLIT_SEED).shuffle(examples)
    return examples[:dev], examples[dev:]


def batches_by_length(run, examples):
    """Evaluation batches with little padding."""
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))
    cut = glue.in_order(examples, EVAL_BATCH)
    return [train.batch_of(run.model, [examples[i] for i in indices]) for indices in cut]


# --------------------------------------------------------------------------------------- importance


@torch.inference_mode()
def mean_loss(model, batches):
    """Mean loss over all examples of the batches, in eval mode; the model's mode is kept."""
    training = model.training
    model.eval()
    losses = [model(**batch).loss.item() * len(batch["labels"]) for batch in batches]
    model.train(training)
    return sum(losses) / sum(len(batch["labels"]) for batch in batches)


@contextlib.contextmanager
def untouched(run):
    """Afterwards A, B, head, on/off, requires_grad and optimizer of a run are what they were."""
    parameters, layers = lora.trainable(run.model), lora.adapters(run.model)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    requires_grad = {name: p.requires_grad for name, p in parameters.items()}
    enabled = {name: layer.enabled for name, layer in layers.items()}
    optimizer = run.optimizer
    try:
        yield
    finally:
        run.optimizer = optimizer
        for name, layer in layers.items():
            layer.enabled = enabled[name]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
                parameter.requires_grad_(requires_grad[name])


def rise_when_off(run, batches, tick):
    """I(m) = L(all but m) - L(all), L the mean loss over the batches.

    Args:
        run: its model has every module on.
        batches: list of batches.
        tick: called with the number of examples that were worked through.

    Returns:
        (L(all), dict name -> I).
    """
    with untouched(run):
        base, rise = mean_loss(run.model, batches), {}
        for name, layer in lora.adapters(run.model).items():
            layer.enabled = False
            rise[name] = mean_loss(run.model, batches) - base
            layer.enabled = True
            tick(sum(len(batch["labels"]) for batch in batches))
    return base, rise


def fall_when_trained(run, groups, steps, tick):
    """I(m) = L(warm head) - L(warm head, m trained alone), L the mean loss over the batches of m.

    Args:
        run: a run at its start; every lora_B is 0.
        groups: the steps of its first epoch; the first `steps` train the head alone, the next
            `steps` train each module alone while the head is frozen.
        steps: int.
        tick: as in rise_when_off.

    Returns:
        (L(warm head), dict name -> I).
    """
    model, lr = run.model, run.args.lr
    layers, warm_up, groups = lora.adapters(model), groups[:steps], groups[steps : 2 * steps]
    batches = batches_by_length(run, [run.train[i] for g in groups for cut in g for i in cut])
    with untouched(run):
        for layer in layers.values():
            layer.enabled = False
        train_for(run, warm_up, lr)
        for module in model.head:
            model.get_submodule(module).requires_grad_(False)
        base, fall = mean_loss(model, batches), {}
        for name, layer in layers.items():
            layer.enabled = True
            train_for(run, groups, lr)
            fall[name] = base - mean_loss(model, batches)
            layer.enabled = False  # what it learned is off with it
            tick(work_of_module(run, "start", steps))
    return base, fall


def train_for(run, groups, lr):
    """Train what is on at a constant learning rate, with a fresh optimizer."""
    run.optimizer = train.make_optimizer(run.model, run.args)
    for group in groups:
        train.train_step(run, group, lr)


def work_of_training(run, steps):
    """In examples that go forward once; the way back costs as much as two of them."""
    return 3 * steps * run.args.batch_size


def work_of_module(run, moment, steps):
    """Of the importance of one module: training and a look at the same batches, or the dev part."""
    examples = steps * run.args.batch_size
    return work_of_training(run, steps) + examples if moment == "start" else len(run.dev)


# ------------------------------------------------------------------------------------------ measure


def scores_of(run, tick):
    """{proxy: {module: score}} of every proxy, and of the baseline "size"."""
    layers, batches, scores = lora.adapters(run.model), train.score_batches(run), {}
    for name in proxies.PROXIES:
        few = batches[::2] if name.startswith("alpha_test") else batches
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # all scores are zero: the report says so
            scores[name] = proxies.score(name, run.model, few)
        tick(work_of_score(run, name))
    costs = {name: a.r * (a.in_features + a.out_features) for name, a in layers.items()}
    scores["size"] = allocate.baseline_scores("size", costs, None)
    return scores


def work_of_score(run, name):
    """About, in examples that go forward once."""
    examples = run.args.score_batches * run.args.batch_size
    alpha = name.startswith("alpha_test")
    return examples * (2 * len(lora.adapters(run.model)) if alpha else 4)


def measure(run, moment, groups, steps, tick):
    """One moment of a run: scores, importance, and what each of them took."""
    started = time.monotonic()
    scores = scores_of(run, tick)
    scored = time.monotonic()
    if moment == "start":
        loss, importance = fall_when_trained(run, groups, steps, tick)
    else:
        loss, importance = rise_when_off(run, batches_by_length(run, run.dev), tick)
    if not all(map(math.isfinite, (loss, *importance.values()))):
        raise train.CannotGoOn(f"a loss at the {moment} is not a number")
    seconds = {"scores": scored - started, "importance": time.monotonic() - scored}
    return {"scores": scores, "importance": importance, "loss": loss, "seconds": seconds}


def moments_of(total):
    """{moment: number of optimizer steps before it}."""
    return {"start": 0, "third": round(total / 3), "end": total}


def work(run, missing, args):
    """What is ahead for some moments of a run, in examples that go forward once."""
    modules, groups = len(lora.adapters(run.model)), len(train.epoch_steps(run, 0))
    at = moments_of(groups * run.args.epochs)
    total = work_of_training(run, max(at[m] for m in missing))
    for moment in missing:
        total += sum(work_of_score(run, name) for name in proxies.PROXIES)
        total += modules * work_of_module(run, moment, args.steps)
    return total


def look_at(run, missing, args, write, bar):
    """Train a run up to the last of the missing moments; measure and write each of them."""
    steps = [g for epoch in range(run.args.epochs) for g in train.epoch_steps(run, epoch)]
    at, trained, started = moments_of(len(steps)), 0, time.monotonic()
    run.model.train()
    for moment in missing:
        for step in range(trained, at[moment]):
            a = run.args
            lr = train.learning_rate(step, len(steps), a.lr, a.schedule, a.warmup)
            train.train_step(run, steps[step], lr)
            bar.update(work_of_training(run, 1))
        trained = at[moment]
        training = time.monotonic() - started
        record = measure(run, moment, steps, args.steps, bar.update)
        record["seconds"]["training"] = training
        write({"moment": moment, "step": trained, **record})
        started = time.monotonic()


def measure_all(args):
    """Every (seed, space, moment) that the file lacks, seed by seed."""
    settings = {name: getattr(args, name) for name in ("model", "dev", "steps", "score_batches")}
    settings |= {"training": TRAINING}
    versions = run_folder.versions()  # of the code that runs, whatever becomes of the checkout
    first = {space: prepare(args, space, args.seeds[0]) for space in args.spaces}
    settings["data"] = runs.fingerprints(first[args.spaces[0]], sharded=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)  # only now: bad input leaves nothing behind
    with run_folder.locked_file(args.out) as file:
        records = cut_torn_line(file, args.out)
        for record in records.values():
            # A line without "data" is of a version that did not write it: taken as alike.
            before = {"data": settings["data"], **record["settings"]}
            name = next((n for n in before | settings if before.get(n) != settings.get(n)), None)
            if name == "data":
                raise ValueError(
                    f"{args.out} was measured on other data or weights: bring them back, or give "
                    "another --out"
                )
            if name:
                raise ValueError(
                    f"{args.out} was measured with {name} {before.get(name)!r}, asked for is "
                    f"{settings.get(name)!r}: give another --out"
                )
        plan = {}
        for seed in args.seeds:
            for space in args.spaces:
                missing = [m for m in MOMENTS if (space, seed, m) not in records]
                if missing:
                    plan[space, seed] = missing
        total = sum(work(first[space], missing, args) for (space, _), missing in plan.items())
        with tqdm(total=total, unit="example", unit_scale=True, dynamic_ncols=True) as bar:
            for (space, seed), missing in plan.items():
                bar.set_description(f"seed {seed}, space {space}")
                about = {"space": space, "seed": seed, "settings": settings}

                def write(record, about=about):
                    append(file, {**about, **record, "versions": versions})

                look_at(prepare(args, space, seed), missing, args, write, bar)


# --------------------------------------------------------------------------------------------- file


def append(file, record):
    """One whole line, on the disk when this returns."""
    file.write((json.dumps(record, allow_nan=False) + "\n").encode())
    file.flush()
    os.fsync(file.fileno())


def cut_torn_line(file, path):
    """The records of a file; a last line that a crash cut short is removed from it."""
    file.seek(0)
    content = file.read()
    records = parse(content, path)
    file.truncate(content.rfind(b"\n") + 1)
    return records


def moment(value):
    return value in MOMENTS


def versions(value):
    return type(value) is dict and {"git", "torch", "python", "threads"} <= value.keys()


FORM = {
    "space": str,
    "seed": count,
    "settings": dict,
    "moment": moment,
    "step": count,
    "scores": {str: {str: finite}},
    "importance": {str: finite},
    "loss": finite,
    "seconds": {str: finite},
    "versions": versions,
}


def parse(content, path):
    """{(space, seed, moment): record} of the whole lines; ValueError names a line that is wrong."""
    records = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            wrong = misfit(record, FORM)
        except (ValueError, RecursionError) as error:
            wrong = repr(error)
        if not wrong:
            modules = record["importance"].keys()
            unlike = [n for n, scores in record["scores"].items() if scores.keys() != modules]
            wrong = "" if modules else "no module was measured"
            wrong = f"{unlike[0]} scores other modules than were measured" if unlike else wrong
        if wrong:
            raise ValueError(f"{path}:{number} is no line of this tool's results: {wrong}")
        key = record["space"], record["seed"], record["moment"]
        for other in records.values():
            same = other["importance"].keys() == modules
            if other["space"] == record["space"] and not same:
                raise ValueError(f"{path}:{number} has other modules than a line before it")
        if key in records:
            raise ValueError(f"{path}:{number} repeats {key}: remove one of the two lines")
        records[key] = record
    return records


# ------------------------------------------------------------------------------------------- report


def spearman(x, y):
    """Pearson's r of the ranks of two dicts with the same keys; None where one is constant."""
    a, b = (np.array([values[name] for name in x]) for values in (x, y))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return glue.correlation(glue.ranks(a), glue.ranks(b))


def overlap(x, y, count):
    """Expected share of the `count` best by x that are among the `count` best by y.

    Ties at the cut share the places that are left: chosen at random, each is in with the same
    probability.
    """

    def weights(values):
        cut = sorted(values.values(), reverse=True)[count - 1]
        above = sum(v > cut for v in values.values())
        tied = sum(v == cut for v in values.values())
        share = (count - above) / tied
        return {n: 1.0 if v > cut else share * (v == cut) for n, v in values.items()}

    a, b = weights(x), weights(y)
    return sum(a[name] * b[name] for name in x) / count


def agreement(scores, importance):
    """(Spearman's rank correlation or None, overlap of the chosen quarter)."""
    count = len(allocate.keep_top(importance, QUARTER))  # the paper's count
    return spearman(scores, importance), overlap(scores, importance, count)


def interval(values):
    """(mean, half the width of its 95 % t-interval; 0 for one value)."""
    mean = sum(values) / len(values)
    return mean, compare_report.over_seeds(values)[1] - mean if len(values) > 1 else 0.0


def pairs_of(records, space, column):
    """[(record scored, record measured)] of a space, one for each seed that has both moments."""
    seeds = sorted({seed for s, seed, _ in records if s == space})
    found = [tuple(records.get((space, seed, moment)) for moment in column) for seed in seeds]
    return [pair for pair in found if all(pair)]


def of_proxy(name, pairs):
    """[(correlation, overlap)] for each seed."""
    return [agreement(a["scores"][name], b["importance"]) for a, b in pairs if name in a["scores"]]


def of_depth(pairs):
    """The same with the number of a module's block for its score: later blocks first."""
    modules = pairs[0][1]["importance"]
    scores = {name: float(name.split(".")[1]) for name in modules}
    return [agreement(scores, measured["importance"]) for _, measured in pairs]


def of_other_seeds(pairs):
    """The same with another seed's importance for scores: what the place tells in any run."""
    found = []
    for i, (_, measured) in enumerate(pairs):
        others = [a["importance"] for j, (a, _) in enumerate(pairs) if j != i]
        found += [agreement(other, measured["importance"]) for other in others]
    return found


def of_chance(pairs, generator):
    """One random order in all seeds: [(correlation, overlap)], means over the seeds, DRAWS times.

    One, because a score that knows nothing of importance repeats itself too: it ranks the places
    nearly alike in every seed. An order for each seed would average out, to a band too narrow.
    """
    found = []
    for _ in range(DRAWS if pairs else 0):
        modules = pairs[0][1]["importance"]
        order = generator.permutation(len(modules)).tolist()
        scores = dict(zip(modules, order, strict=True))
        draws = [agreement(scores, measured["importance"]) for _, measured in pairs]
        defined = [[d[i] for d in draws if d[i] is not None] for i in (0, 1)]
        found.append(tuple(sum(d) / len(d) if d else None for d in defined))
    return found


def show(values, kind):
    """A cell of a table: mean ± half width; for "chance" mean and where 95 % of the draws lie."""
    seeds, values = len(values), [v for v in values if v is not None]
    if not values:
        return "–"
    if kind == "chance":
        low, high = np.quantile(values, (0.025, 0.975))
        return f"{np.mean(values):z.2f} ({low:z.2f} … {high:z.2f})"
    mean, half = interval(values)
    width = f" ± {half:.2f}" if kind == "proxy" and len(values) > 1 else ""
    short = f" ({len(values)} of {seeds})" if len(values) < seeds else ""
    return f"{mean:z.2f}{width}{short}"


def tables(records):
    """Lines of Markdown: correlations, overlaps, and what was measured."""
    columns = [(space, column) for space in SPACES for column in COLUMNS]
    found = {column: pairs_of(records, *column) for column in columns}
    columns = [column for column in columns if found[column]]
    generator = np.random.default_rng(0)
    names = list(dict.fromkeys(n for record in records.values() for n in record["scores"]))
    rows = {n: ("proxy", [of_proxy(n, found[c]) for c in columns]) for n in names}
    rows["depth"] = ("proxy", [of_depth(found[c]) for c in columns])
    rows["random"] = ("chance", [of_chance(found[c], generator) for c in columns])
    rows["importance, another seed"] = ("others", [of_other_seeds(found[c]) for c in columns])
    titles = [f"{s}, {a if a == b else f'{a} → {b}'}" for s, (a, b) in columns]
    lines = []
    for i, what in enumerate(("Spearman's rank correlation", "overlap of the chosen quarter")):
        lines += [f"| {what} | {' | '.join(titles)} |", "|---" * (1 + len(columns)) + "|"]
        for name, (kind, cells) in rows.items():
            shown = [show([pair[i] for pair in cell], kind) for cell in cells]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    return lines + explanation() + conditions(records)


def explanation():
    return [
        "Score at one moment against importance at the same, or (start → end) at the end. Mean and",
        "95 % t-interval over the seeds, of these modules; – = undefined, all scores are alike.",
        "depth: the number of the block, later ones first.",
        f"random: one order of the modules in all seeds, drawn {DRAWS:,} times: the mean, and",
        "where 95 % of the draws' means over the seeds lie. Another seed's importance: the mean",
        "over pairs of seeds; what knowing the place tells, without the run.",
        "",
    ]


def conditions(records):
    """Lines of Markdown: seeds, losses, importances and seconds, versions."""
    lines = [
        "| space, moment | seeds | step | loss | importance: least, median, largest | seconds |"
    ]
    lines.append("|---" * 6 + "|")
    for space in SPACES:
        for moment in MOMENTS:
            chosen = [r for (s, _, m), r in records.items() if (s, m) == (space, moment)]
            if not chosen:
                continue
            values = np.array([v for r in chosen for v in r["importance"].values()])
            spread = ", ".join(f"{f(values):z.3g}" for f in (np.min, np.median, np.max))
            loss = np.mean([r["loss"] for r in chosen])
            seconds = np.mean([sum(r["seconds"].values()) for r in chosen])
            seeds, steps = (sorted({r[k] for r in chosen}) for k in ("seed", "step"))
            shown = (", ".join(map(str, seeds)), ", ".join(map(str, steps)), f"{loss:.4f}", spread)
            lines.append(f"| {space}, {moment} | {' | '.join(shown)} | {seconds:.0f} |")
    versions = dict.fromkeys(
        f"commit {v['git']}, torch {v['torch']}, Python {v['python']}, {v['threads']} thread(s)"
        for v in (record["versions"] for record in records.values())
    )
    settings = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in record["settings"].items() if name != "data")
        for record in records.values()
    )
    return [*lines, "", *versions, *settings]


def picture(records, path):
    """A panel for each space and column: a dot for each seed, a line at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(n for record in records.values() for n in record["scores"]))
    figure, grid = plt.subplots(
        len(SPACES), len(COLUMNS), figsize=(12, 7), sharex=True, sharey=True, layout="constrained"
    )
    for i, space in enumerate(SPACES):
        for axes, column in zip(grid[i], COLUMNS, strict=True):
            pairs, (scored, measured) = pairs_of(records, space, column), column
            for row, name in enumerate(names):
                values = [r for r, _ in of_proxy(name, pairs) if r is not None]
                axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6)
                if values:
                    axes.plot([np.mean(values)], [row], "|", color="black", markersize=14)
            axes.axvline(0, color="grey", linewidth=0.8)
            title = scored if scored == measured else f"{scored} → {measured}"
            axes.set(title=f"space {space}, {title}", xlim=(-1.05, 1.05))
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("Spearman's rank correlation of score and importance, a dot for each seed")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------- main


def list_of(parse):
    """An argparse type: a comma-separated list without repeats."""
    return lambda text: list(dict.fromkeys(map(parse, text.split(","))))


def parse_flags(argv):
    """The command line; ValueError on bad input."""
    parser = flags.Parser(prog="ablation.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=flags.Parser)
    one = commands.add_parser("run", help="train, score, measure")
    natural = flags.number(int, 0)
    positive = flags.number(int, 1)
    for name, kind, default, text in (
        ("data-dir", str, None, "folder with MRPC's train.tsv and dev.tsv; without it, the hub"),
        ("out", Path, Path("results/ablation.jsonl"), "file that lines are added to"),
        ("seeds", list_of(natural), [0, 1, 2, 3, 4], "comma-separated"),
        ("spaces", list_of(flags.one_of(*SPACES)), list(SPACES), "comma-separated"),
        ("model", str, "minilm", "minilm, a folder in Hugging Face layout, or a hub id"),
        ("dev", positive, 600, "examples in the tuning dev part"),
        ("steps", positive, 30, "of the head's warm-up, and of each module, at the start"),
        ("score-batches", positive, 4, "first batches of the training set that are scored"),
    ):
        one.add_argument(f"--{name}", type=kind, default=default, help=text, metavar="X")
    commands.add_parser("report", help="print tables, draw").add_argument("file", type=Path)
    return parser.parse_args(argv)


def main(argv=None):
    """Exit code: 0 done; 1 a loss is not a number; 2 bad input; 130 interrupted."""
    try:
        args = parse_flags(argv)
        if args.command == "run":
            measure_all(args)
            return 0
        records = parse(args.file.read_bytes(), args.file)
        if not records:
            raise ValueError(f"{args.file} has no whole line: nothing to report")
        print("\n".join(tables(records)))
        picture(records, args.file.with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"ablation.py: {one_line(error, 600)}", file=sys.stderr)
        return 2
    except train.CannotGoOn as error:
        print(f"ablation.py: {error}; what was measured before is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last whole line", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
