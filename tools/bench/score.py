"""What scoring costs, and how many batches it takes: bench score, bench agreement.

    score       each proxy, in training steps on the same batch; a decision without its scores;
                the share of scoring in the time of real runs
    agreement   |S_n ∩ S_32| / |S_32|, over the decisions of real runs: the share of what 32
                batches choose (S_32) that n of them choose too (S_n), or that 32 others choose

What this file does not do: judge which choice trains better (tools/compare.py).
"""

import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch

import allocate
import lora
import proxies
import train
from support import evaluation, flags, run_folder, seeds
from tools.bench import pictures, timing

COUNTS = (1, 2, 4, 8, 16, 32)
EVERY = 0.5  # epochs between two decisions of the "agreement" runs
PRESET = "--preset heterolora --lr 1e-3 --batch-size 16"


def flags_of(task, data_dir, rest=""):
    """A command line of train.py."""
    given = ["--task", task, *rest.split()]
    return given + (["--data-dir", data_dir] if data_dir else [])


# -------------------------------------------------------------------------------------------- score


def share_in_a_run(argv):
    """(share of scoring in the seconds of a run, number of decisions)."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, contextlib.redirect_stderr(io.StringIO()):
            train.main([*argv, "--epochs", "1", "--out", f"{folder}/run"])
        log = run_folder.read_log(Path(folder) / "run")
    done, decisions = log[-1], [e for e in log if e["event"] == "score"]
    return done["score_seconds"] / done["seconds"], len(decisions)


def reallocation():
    """A decision among 300 modules of two sizes, ranked and within a budget: {name: function}."""
    rng = torch.Generator().manual_seed(0)
    places = ("q_proj", "v_proj", "fc1", "fc2", "residual_1", "shortcut_sa")
    names = [f"layers.{i}.{place}" for i in range(300 // len(places)) for place in places]
    scores = dict(zip(names, torch.rand(len(names), generator=rng).tolist(), strict=True))
    costs = {n: 8 * 1024 * (5 if "fc" in n else 2) for n in names}
    budget = sum(costs.values()) // 4
    return {
        "ranked": [lambda: allocate.keep_top(scores, 0.25, generator=rng)],
        "within a budget": [lambda: allocate.within_budget(scores, costs, budget, rng)],
    }


def score(rounds, task, data_dir, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    run = train.set_up(flags.parse_flags(flags_of(task, data_dir)))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora.adapters(run.model).values():
            layer.lora_B.normal_(0, 0.02, generator=rng)
    first = list(range(run.args.batch_size))
    batches = [evaluation.batch_of(run.model, [run.train[i] for i in first])]
    arms = {"step": [lambda: train.train_step(run, [first], 1e-3)]}
    for name in proxies.PROXIES:
        arms[name] = [lambda name=name: proxies.score(name, run.model, batches)]
    seconds = timing.interleaved(arms, rounds)
    steps = seconds.pop("step")
    ratios = {name: timing.ratio(s, steps) for name, s in seconds.items()}
    lines = ["| proxy, one batch of 16 | in training steps on it |", "|---|---|"]
    lines += [f"| {name} | {timing.show(three, 1)} |" for name, three in ratios.items()]
    lines += ["", "| a decision among 300 modules, without its scores | ms |", "|---|---|"]
    for name, values in timing.interleaved(reallocation(), rounds).items():
        milliseconds = [1000 * value for value in timing.spread(values)]
        lines.append(f"| {name} | {timing.show(milliseconds, 1)} |")
    lines += ["", "| one epoch of | decisions | share of scoring in its time |", "|---|---|---|"]
    for rest in ("", PRESET):
        share, decisions = share_in_a_run(flags_of(task, data_dir, rest))
        lines.append(f"| `train.py {rest}` | {decisions} | {share:.1%} |")
    lines += ["", f"{task}, MiniLM, 35 modules, batch 16; " + timing.conditions(rounds)]
    pictures.bars(picture, ratios, "training steps, for one batch")
    return lines


# ---------------------------------------------------------------------------------------- agreement


def decisions(argv):
    """Train at a constant rate, else as the flags say; at each decision score and choose.

    Scored is with every count of COUNTS, chosen by 32.

    Returns:
        list of {count: share of S_32, "others": the share that the next 32 batches choose}.
    """
    run = train.set_up(flags.parse_flags(argv))
    args, found = run.args, []
    timing.refuse_few(args.task, run.train, 2 * COUNTS[-1] * args.batch_size)
    examples, b = run.train[: 2 * COUNTS[-1] * args.batch_size], args.batch_size
    batches = [
        evaluation.batch_of(run.model, examples[i : i + b]) for i in range(0, len(examples), b)
    ]  # in the order of the training set, so that n batches are a part of 32

    def chosen(batches):
        scores = proxies.score(args.proxy, run.model, batches)
        ties = seeds.generator(args.seed, f"allocation/{run.step}")
        return allocate.keep_top(scores, args.keep, generator=ties)

    for run.epoch in range(args.epochs):
        run.model.train()
        groups = train.epoch_steps(run, run.epoch)
        for i, group in enumerate(groups):
            if run.plan.due(run.step, i, len(groups)):
                sets = {n: chosen(batches[:n]) for n in COUNTS}
                sets["others"] = chosen(batches[COUNTS[-1] :])
                on = sets[COUNTS[-1]]
                found.append({n: len(s & on) / len(on) for n, s in sets.items()})
                lora.switch(run.model, on)
            train.train_step(run, group, args.lr)
            run.step += 1
    return found


def agreement(task, data_dir, seeds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    rest = f"--every {EVERY} --epochs 2"
    started, found = time.monotonic(), []
    for seed in seeds:
        found += decisions(flags_of(task, data_dir, f"{rest} --seed {seed}"))
    lines = ["| batches of 16 | share of what 32 choose | smallest |", "|---|---|---|"]
    shown = {}
    for n in (*COUNTS[:-1], "others"):
        shares = [d[n] for d in found]
        name = "the next 32" if n == "others" else str(n)
        shown[name] = (statistics.mean(shares), min(shares), max(shares))
        lines.append(f"| {name} | {statistics.mean(shares):.1%} | {min(shares):.0%} |")
    lines += [
        "",
        f"{len(found)} decisions: seeds {seeds}, `train.py {rest}` at a constant rate, {task}",
    ]
    lines.append(f"torch {torch.__version__}; {time.monotonic() - started:.0f} s")
    pictures.bars(picture, shown, "share of what 32 batches choose", 0.95)
    return lines
