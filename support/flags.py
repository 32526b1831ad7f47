"""The command line of train.py: every flag with its type, default and one line of help.

A method is a combination of flags; a preset is nothing but a documented set of them, and a flag
that is given wins over it. Bad input is a ValueError with one line: what, got, allowed.

What this file does not do: say which flags go together (settings.py), look at data, models or
devices (train.py does).
"""

import argparse
import difflib
import itertools
import math
import shlex
import sys
import types

import allocate
import lora
import proxies
from relatives import METHODS, NOT_LINEAR_IN_R
from support import distributed, download, large, run_folder, tasks
from support.errors import shown
from support.settings import refuse_conflicts

# -------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a ValueError like any other bad input: one line, no usage."""

    def error(self, message):
        raise ValueError(message)


def number(kind, low, high=math.inf, open_high=False):
    """An argparse type: a finite int or float from low to high; an int has 64 bits at most."""

    def parse(text):
        try:
            value = kind(text)
            wrong = (
                not math.isfinite(value)
                or not low <= value <= high
                or (open_high and value == high)
                or (kind is int and value >= 2**63)
            )
        except (ValueError, OverflowError):  # OverflowError: an int that no float can hold
            wrong = True
        if wrong:
            what = "an integer" if kind is int else "a number"
            upper = " up to 2**63 - 1" if kind is int else " up"
            if high < math.inf:
                upper = f" {'below' if open_high else 'to'} {high}"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {what} from {low}{upper}")
        return value

    return parse


def path(text):
    """An argparse type: a path; a ~ that the shell left is a home folder, as in --data-dir."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return str(download.expanded(text)) if text.startswith("~") else text


def one_of(*allowed):
    """An argparse type: one of a few names; a near miss is told the nearest."""

    def parse(text):
        if text not in allowed:
            near = difflib.get_close_matches(text, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(allowed)}{hint}")
        return text

    return parse


def names(*allowed):
    """An argparse type: a comma-separated list of names, or "none" -> a list without repeats."""

    def parse(text):
        return [] if text == "none" else list(dict.fromkeys(map(one_of(*allowed), text.split(","))))

    return parse


FLAGS = {  # name: (type, default, help)
    "task": (
        one_of(*tasks.TASKS),
        tasks.DEFAULT,
        f"one of {', '.join(tasks.TASKS)}; with a causal model: {tasks.DEFAULT_CAUSAL}",
    ),
    "data-dir": (str, None, "folder with the task's files, GLUE's TSVs or text; else the hub"),
    "train-records": (number(int, 1), None, "the first so many of the training set, not all"),
    "eval-records": (number(int, 1), None, "the first so many to evaluate on, not all"),
    "model": (str, "minilm", "minilm, smollm2, smollm2-q4, a folder, a .gguf file, or a hub id"),
    "targets": (
        names(*lora.LINEARS),
        ["q_proj", "v_proj"],
        f"layers that get LoRA, out of {','.join(lora.LINEARS)}; none = train the head alone",
    ),
    "r": (number(int, 1), 8, "rank"),
    "lora-alpha": (number(float, 0), 16.0, "scaling = lora_alpha / r"),
    "shortcuts": (
        one_of(*lora.SHORTCUTS),
        "all",
        f"LoRA-adapted shortcut connections: {', '.join(lora.SHORTCUTS)}",
    ),
    "shortcut-alpha": (number(float, 0), 4.0, "lora_alpha of the shortcuts"),
    "shortcut-norm": (
        one_of("none", "reuse"),
        "none",
        "reuse = LayerNorm once more after a cross-layer shortcut, as the released code does",
    ),
    "adapter": (
        one_of(*METHODS["adapter"]),
        "lora",
        f"what is put on the targets: {', '.join(METHODS['adapter'])}",
    ),
    "optimizer": (
        one_of(*METHODS["optimizer"]),
        "adamw",
        f"what trains them: {', '.join(METHODS['optimizer'])}",
    ),
    "lora-dropout": (number(float, 0, 1, True), 0.0, "dropout on the input of the low-rank branch"),
    "allocate": (
        one_of("none", "static", "dynamic", *METHODS["allocator"]),
        "dynamic",
        "which modules are on: none = all; static = chosen once; dynamic = chosen anew on the way; "
        f"or a method that allocates ranks: {', '.join(METHODS['allocator'])}",
    ),
    "proxy": (
        one_of(*proxies.PROXIES, *allocate.BASELINES),
        "grad_norm",
        f"what a module is scored by: {', '.join(proxies.PROXIES)}; or a baseline: "
        f"{', '.join(allocate.BASELINES)}",
    ),
    "keep": (
        number(float, 0, 1),
        0.5,
        "budget as the fraction of modules that stay on (adalora: of ranks)",
    ),
    "budget-params": (
        number(int, 1),
        None,
        "budget as a number of adapter parameters, never exceeded",
    ),
    "per-rank": (
        one_of("yes", "no"),
        "no",
        "yes = spend --budget-params on single ranks; dynamic: at least one in every module",
    ),
    "when-off": (
        one_of("out", "frozen"),
        "out",
        "what is switched off goes out of the forward pass, as released, or stays in it, frozen",
    ),
    "every": (
        number(float, 1e-9, 1),
        0.5,
        "part of an epoch between two decisions, counted inside each epoch",
    ),
    "score-batches": (number(int, 1), 4, "first batches of the training set that are scored"),
    "ranking": (
        one_of("together", "apart"),
        "together",
        "LoRA modules and shortcuts in one ranking (released: combined), or apart (separated)",
    ),
    "delta-ratio": (number(float, -1e6, 1e6), 0.0, "Delta-LoRA's lambda; 0 = the weights stay"),
    "delta-start": (
        number(int, -1),
        None,
        "Delta-LoRA's K: weights first move after step K + 2; -1 = from the first step (default: "
        "a third of the first epoch)",
    ),
    "delta-lazy": (
        one_of("yes", "no"),
        "no",
        "yes = leave the weights alone, add the same change in the forward pass",
    ),
    "base-dtype": (
        one_of(*large.DTYPES),
        "fp32",
        "of the frozen weights; bf16 = bfloat16, and float32 for what trains",
    ),
    "shard": (
        one_of("yes", "no"),
        "no",
        "yes = under torchrun, every process keeps a part of each block's frozen weights",
    ),
    "epochs": (number(int, 1), 3, "passes over the training data; of text tasks 1"),
    "batch-size": (number(int, 1), 16, "examples in one forward pass; of text tasks 8"),
    "accumulate": (number(int, 1), 1, "batches in one optimizer step"),
    "lr": (number(float, 0), 1e-3, "learning rate; of text tasks 2e-3"),
    "weight-decay": (number(float, 0), 0.01, "decoupled weight decay of AdamW"),
    "schedule": (one_of("constant", "linear"), "linear", "constant, or linear to 0, after warm-up"),
    "warmup": (number(int, 0), 30, "steps of a rate that rises from 0; of text tasks 10"),
    "clip": (number(float, 0), 0.0, "largest gradient norm; 0 = no clipping"),
    "dropout": (number(float, 0, 1, True), 0.0, "dropout of the backbone"),
    "max-length": (
        number(int, 8),
        None,
        "tokens of an example, longer ones are truncated (default: the task's, 128 for pairs; or "
        "what the model has)",
    ),
    "seed": (number(int, 0), 0, "of lora_A, head, data order, dropout, ties and what is held out"),
    "device": (str, "auto", "cpu, cuda, cuda:1, …; auto = cuda if there is one"),
    "log-every": (number(int, 1), 10, "steps between two train lines in metrics.jsonl"),
    "out": (path, None, "run folder, new or empty; by default runs/TASK-DATE-TIME"),
}
OF_TEXT = {  # defaults of a task that is written text: a causal model, a few dear steps
    "epochs": 1,
    "batch_size": 8,
    "lr": 2e-3,
    "warmup": 10,
}
RELEASED = {  # the authors' MRPC runs with shortcuts (OPT-350M)
    "targets": ["q_proj", "v_proj"],
    "lora_alpha": 16.0,
    "shortcuts": "all",
    "shortcut_alpha": 4.0,
    "lr": 2e-4,
    "weight_decay": 0.01,
    "schedule": "constant",
    "warmup": 0,
    "batch_size": 8,
    "epochs": 20,
}
LORA = {"allocate": "none", "shortcuts": "none"}
GRAD_NORM = {"r": 8, "allocate": "dynamic", "proxy": "grad_norm", "keep": 0.25, "every": 0.2}
PRESETS = {
    "lora": LORA,  # plain LoRA, every module on
    "heterolora": GRAD_NORM,  # the paper's: a quarter of the modules, chosen five times an epoch
    # about the budget of heterolora (3 % less), spread evenly, at the same scaling alpha / r
    "uniform-r2": {"r": 2, "lora_alpha": 4.0, "shortcut_alpha": 1.0, "allocate": "none"},
    "delta-lora": {**LORA, "delta_ratio": 2.0, "lr": 5e-4},  # K: a third of the first epoch
    "heterolora-released": {**RELEASED, **GRAD_NORM, "score_batches": 32},
    "uniform-r2-released": {**RELEASED, "r": 2, "allocate": "none"},
    # The only values of Delta-LoRA that are known to us (docs/deviations.md 43).
    "delta-lora-released": {**LORA, "r": 8, "delta_ratio": 2.0, "delta_start": 500},
}
# Flags that may stand beside --resume.
RESUMABLE = ("resume", "eval_only", "test", "device", "data_dir")
# Flags that matter to a model that is measured as it is, --eval-only without --resume.
MEASURING = (
    *RESUMABLE, "task", "model", "eval_records", "max_length", "seed", "base_dtype", "shard"
)  # fmt: skip


def parse_flags(argv, task_of=None):
    """Command line -> namespace; with --resume the flags come from that run.

    Args:
        argv: list of words, None = those of the program.
        task_of: function (name of a model) -> its task where none is given, as tasks.default, which
            looks at the model; None = the same for every model.
    """
    about = "Train HeteroLoRA, Delta-LoRA or LoRA on a pretrained transformer."
    parser = Parser(prog="train.py", description=about, allow_abbrev=False)
    for name, (kind, default, text) in FLAGS.items():
        shown = ",".join(default) if isinstance(default, list) else default
        help_text = f"{text} (default: {shown})" if default is not None else text
        parser.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=help_text, metavar="X"
        )
    parser.add_argument(
        "--preset",
        type=one_of(*PRESETS),
        default=None,
        metavar="X",
        help=f"a set of flags: {', '.join(PRESETS)}; what is given beside it wins",
    )
    parser.add_argument(
        "--test",
        action="store_true",
        help="after the last epoch also evaluate on the task's test set, if it has labels",
    )
    parser.add_argument("--resume", type=path, metavar="DIR", help="go on with the run in DIR")
    what = "evaluate and stop: with --resume that run; of a text task also --model as it is"
    parser.add_argument("--eval-only", action="store_true", help=what)
    parser.add_argument(
        "--dry-run", action="store_true", help="one step and one evaluation batch, nothing written"
    )
    refuse_two_allocators(sys.argv[1:] if argv is None else argv)
    found, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, [*FLAGS, "preset", "test", "resume", "eval-only", "dry-run", "help"])
    given = vars(found)
    if given["resume"] is None:
        task = given.get("task")
        if task is None and task_of and "model" in given:
            task = task_of(given["model"])
        args = {**defaults(task), **PRESETS.get(given["preset"], {}), **given}
        if given["eval_only"] and tasks.TASKS[args["task"]].head != "lm":
            raise ValueError("--eval-only needs --resume DIR, the run to evaluate")
        beside = given_beside(given, MEASURING) if given["eval_only"] else None
        if beside:
            raise ValueError(f"{beside} does nothing with --eval-only: no run, and nothing trains")
        refuse_conflicts(given, args)
        return types.SimpleNamespace(**args)
    beside = given_beside(given, RESUMABLE)
    if beside:
        raise ValueError(f"{beside} cannot be changed by --resume: a run keeps its flags")
    stored = stored_flags(given["resume"])
    return types.SimpleNamespace(**{**stored, **given, "test": given["test"] or stored["test"]})


def given_beside(given, allowed):
    """The first flag that is given and not among those that are allowed, as it is written; or None.

    A flag of 0, or of nothing, is given; False and None are those of --test, --preset and the like.
    """
    names = (n for n, v in given.items() if n not in allowed and v is not None and v is not False)
    return next((f"--{name.replace('_', '-')}" for name in names), None)


def defaults(task=None):
    """dict of every flag's default; a task that is written text has a few of its own."""
    found = {name.replace("-", "_"): default for name, (_, default, _) in FLAGS.items()}
    found["task"] = task or found["task"]
    return {**found, **(OF_TEXT if tasks.TASKS[found["task"]].head == "lm" else {})}


def refuse_unknown(words, known):
    """Raises ValueError where words are left that are no flag; a near miss is told the nearest."""
    if not words:
        return
    flag = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
    near = difflib.get_close_matches(flag, [f"--{name}" for name in known], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; python train.py --help lists all"
    if flag == "--rank":
        hint = "; a module's rank is --r, and --ranking says how modules are ranked"
    raise ValueError(f"unrecognized arguments: {' '.join(words)}{hint}")


def refuse_two_allocators(argv):
    """Raises ValueError where --allocate is given twice, and a method is among its two values.

    argparse takes the last one, as it does of --allocate dynamic --allocate static.
    """
    words = " ".join(argv).replace("=", " ").split()
    given = [value for flag, value in itertools.pairwise(words) if flag == "--allocate"]
    if len(set(given)) > 1 and set(given) & set(METHODS["allocator"]):
        named = " and ".join(f"--allocate {value}" for value in dict.fromkeys(given))
        raise ValueError(f"{named}: a run has one allocator")


def stored(args):
    """The flags that config.json keeps: all but those of this one call."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "eval_only", "dry_run")}


def stored_flags(folder):
    """The flags of a run, each as the command line would take it.

    Raises:
        ValueError: a flag that is wrong or not there, by its name.
    """
    stored, args = run_folder.read_config(folder), {}
    for name, (kind, default, _) in FLAGS.items():
        key = name.replace("-", "_")
        value = args[key] = stored.get(key, default)
        if value is None and default is None:
            continue
        text = (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
        try:
            fits = kind(text) == value
        except argparse.ArgumentTypeError:
            fits = False
        if not fits:
            raise ValueError(f"{folder}/config.json: {key} is {value!r}, no value of --{name}")
    lacks = args.keys() - stored.keys()
    if lacks:
        raise ValueError(
            f"{folder}/config.json lacks {min(lacks)}: no run of this train.py made it"
        )
    args["test"] = stored.get("test", False)
    if not isinstance(args["test"], bool):
        raise ValueError(f"{folder}/config.json: test is {args['test']!r}, expected true or false")
    refuse_conflicts({}, args)
    return args


def describe(args):
    """The method in one line."""
    shortcuts = f"{args.shortcuts} shortcuts" if args.shortcuts != "none" else ""
    places = [place for place in (",".join(args.targets), shortcuts) if place]
    if not places:
        return "head alone"
    method = "LoRA" if args.adapter == "lora" else args.adapter
    name = f"{method} r={args.r} on {' + '.join(places)}"
    if args.delta_ratio:
        lazy = ", lazy" if args.delta_lazy == "yes" else ""
        name = f"Delta-LoRA lambda={args.delta_ratio:g} K={args.delta_start}{lazy}: {name}"
    if args.allocate == "none":
        return name
    if args.allocate in METHODS["allocator"]:
        return f"{args.allocate}{f' keep {args.keep:g}' * (args.allocate == 'adalora')}: {name}"
    budget = (
        f"keep {args.keep}" if args.budget_params is None else f"{args.budget_params:,} parameters"
    )
    budget += " on single ranks" if args.per_rank == "yes" else ""
    budget += ", off = frozen" if args.when_off == "frozen" else ""
    return f"{args.allocate} HeteroLoRA, {args.proxy}, {budget}: {name}"


def exactly(value):
    """A float as the command line takes it back, the same number: " 16", or "=-0.5"."""
    short = f"{value:g}"
    text = short if float(short) == value else repr(value)
    return f"={text}" if value < 0 else f" {text}"


def equal_budget_control(args, spent, costs):
    """The run that spends as much on every module alike, at the same scaling alpha / r.

    Args:
        args: the flags of a run that allocates.
        spent: int, its adapter parameters. costs: dict module -> parameters at rank args.r.

    Returns:
        (command, parameters), or None where not even rank 1 everywhere fits, or where the cost is
        not r times that of rank 1.
    """
    if args.adapter in NOT_LINEAR_IN_R:
        return None
    one = sum(costs.values()) // args.r  # rank 1 everywhere
    r = spent // one
    if r == 0:
        return None
    control = {**vars(args), "allocate": "none", "r": r}
    for alpha in ("lora_alpha", "shortcut_alpha"):
        control[alpha] = control[alpha] / args.r * r
    if not args.targets:
        del control["lora_alpha"]
    if args.shortcuts == "none":
        del control["shortcut_alpha"]
    given = {"task": args.task}
    about_allocation = ("keep", "budget-params", "per-rank", "when-off", "every", "score-batches")
    for name, default in ((n, defaults(args.task)[n.replace("-", "_")]) for n in FLAGS):
        value = control.get(name.replace("-", "_"), default)
        left_out = (*about_allocation, "ranking", "proxy", "out", "device")
        if value != default and name not in left_out:
            given[name] = ",".join(value) or "none" if isinstance(value, list) else value
    text = " ".join(
        f"--{k}{exactly(v)}" if isinstance(v, float) else f"--{k} {shlex.quote(str(v))}"
        for k, v in given.items()
    )
    text += " --test" * args.test
    return f"{distributed.command()} train.py {text}", r * one
