"""Train LoRA on a pretrained transformer: python train.py --task mrpc

Reads in the order of time: flags, set-up, the loop, evaluation, the result. A run folder (runs.py)
holds all that is needed to go on after an interruption, to the same bits.

    step       one optimizer step, over --accumulate batches of --batch-size examples
    loss       mean over the examples of a step, whatever batches they came in

What this file does not do: train on several machines, mixed precision, compile, search
hyper-parameters.
"""

import argparse
import dataclasses
import difflib
import math
import signal
import sys
import time
import types
from pathlib import Path

import torch
from tqdm import tqdm

import data
import lora
import runs
import seeds
from model import load_pretrained

EVAL_BATCH_SIZE = 64

# -------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a ValueError like any other bad input: one line, no usage."""

    def error(self, message):
        raise ValueError(message)


def number(kind, low, high=math.inf, open_high=False):
    """An argparse type: a finite int or float from low to high."""

    def parse(text):
        try:
            value = kind(text)
            wrong = (
                not math.isfinite(value)
                or not low <= value <= high
                or (open_high and value == high)
            )
        except ValueError:
            wrong = True
        if wrong:
            what = "an integer" if kind is int else "a number"
            upper = f" {'below' if open_high else 'to'} {high}" if high < math.inf else " up"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low}{upper}")
        return value

    return parse


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
    "task": (one_of(*data.TASKS), "paraphrase", f"one of {', '.join(data.TASKS)}"),
    "data-dir": (str, None, "folder with GLUE's train.tsv and dev.tsv; without it, the hub"),
    "model": (str, "minilm", "minilm, a folder in Hugging Face layout, or a hub id"),
    "targets": (
        names(*lora.LINEARS),
        ["q_proj", "v_proj"],
        f"layers that get LoRA, out of {','.join(lora.LINEARS)}; none = train the head alone",
    ),
    "r": (number(int, 1), 8, "rank"),
    "lora-alpha": (number(float, 0), 16.0, "scaling = lora_alpha / r"),
    "lora-dropout": (number(float, 0, 1, True), 0.0, "dropout on the input of the low-rank branch"),
    "epochs": (number(int, 1), 12, "passes over the training data"),
    "batch-size": (number(int, 1), 16, "examples in one forward pass"),
    "accumulate": (number(int, 1), 1, "batches in one optimizer step"),
    "lr": (number(float, 0), 1e-3, "learning rate of AdamW"),
    "weight-decay": (number(float, 0), 0.01, "decoupled weight decay of AdamW"),
    "schedule": (one_of("constant", "linear"), "constant", "learning rate after the warm-up"),
    "warmup": (number(int, 0), 0, "steps over which the learning rate rises from 0"),
    "clip": (number(float, 0), 0.0, "largest gradient norm; 0 = no clipping"),
    "dropout": (number(float, 0, 1, True), 0.0, "dropout of the backbone"),
    "max-length": (
        number(int, 8),
        None,
        "tokens of a pair, longer ones are truncated (default: 128, or what the model has)",
    ),
    "seed": (number(int, 0), 0, "of lora_A, head, data order and dropout"),
    "device": (str, "auto", "cpu, cuda, cuda:1, …; auto = cuda if there is one"),
    "log-every": (number(int, 1), 10, "steps between two train lines in metrics.jsonl"),
    "out": (str, None, "run folder, new or empty; by default runs/TASK-DATE-TIME"),
}
RESUMABLE = ("resume", "eval_only", "device", "data_dir")  # flags that may stand beside --resume


def parse_flags(argv):
    """Command line -> namespace; with --resume the flags come from that run."""
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    for name, (kind, default, text) in FLAGS.items():
        shown = ",".join(default) if isinstance(default, list) else default
        help_text = f"{text} (default: {shown})" if default is not None else text
        parser.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=help_text, metavar="X"
        )
    parser.add_argument("--resume", default=None, metavar="DIR", help="go on with the run in DIR")
    parser.add_argument("--eval-only", action="store_true", help="with --resume: evaluate and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="one step and one evaluation batch, nothing written"
    )
    given = vars(parser.parse_args(argv))
    defaults = {name.replace("-", "_"): default for name, (_, default, _) in FLAGS.items()}
    if given["resume"] is None:
        if given["eval_only"]:
            raise ValueError("--eval-only needs --resume DIR, the run to evaluate")
        return types.SimpleNamespace(**{**defaults, **given})
    for name in given:
        if name not in RESUMABLE and given[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} cannot be changed by --resume: the run's own flags "
                "are used"
            )
    stored = runs.read_config(given["resume"])
    return types.SimpleNamespace(**{**defaults, **stored, **given})


def pick_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}; try cpu") from error
    return device


# ------------------------------------------------------------------------------------------- set-up


@dataclasses.dataclass
class Run:
    """All that the loop needs; what changes in it is what a checkpoint stores."""

    args: types.SimpleNamespace
    task: data.Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train: list  # encoded examples
    dev: list
    device: torch.device
    notes: list  # lines for the person who started the run
    folder: Path | None = None
    epoch: int = 0  # finished ones
    batch: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    best: dict | None = None  # metrics of the best epoch
    last: dict | None = None
    seconds: float = 0.0
    stop: bool = False  # Ctrl-C was pressed


def trainable(model):
    """dict name -> parameter, in a fixed order: adapters that are on or off, then the head."""
    found = {}
    for name, layer in lora.adapters(model).items():
        found |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    for module in model.head:
        for name, parameter in model.get_submodule(module).named_parameters():
            found[f"{module}.{name}"] = parameter
    return found


def set_up(args):
    """Load data and model, inject, build the optimizer. Raises ValueError or OSError on bad
    input."""
    device, notes = pick_device(args.device), []
    task = data.TASKS[args.task]
    train_texts, dev_texts = data.load_task(args.task, args.data_dir)
    model, tokenizer = load_pretrained(
        args.model, num_labels=task.num_labels, dropout=args.dropout, seed=args.seed
    )
    limit = model.config.max_positions
    max_length = args.max_length or min(128, limit)
    if max_length > limit:
        raise ValueError(f"--max-length is {max_length}, {args.model} has {limit} positions")
    train_set, cut = data.encode(train_texts, tokenizer, max_length)
    dev_set, dev_cut = data.encode(dev_texts, tokenizer, max_length)
    if cut + dev_cut:
        notes.append(f"{cut + dev_cut} examples are longer than {max_length} tokens: truncated")
    if model.fresh:
        notes.append(f"fresh head, not in the checkpoint: {', '.join(model.fresh)}")
    if args.targets:
        lora.inject(
            model,
            args.targets,
            r=args.r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            seed=args.seed,
        )
    lora.mark_trainable(model)
    model.to(device)
    optimizer = torch.optim.AdamW(
        trainable(model).values(), lr=args.lr, weight_decay=args.weight_decay
    )
    torch.manual_seed(args.seed)  # for dropout; everything else has a generator of its own
    return Run(args, task, model, optimizer, train_set, dev_set, device, notes)


def checkpoint_state(run):
    """What a checkpoint holds."""
    return {
        "parameters": {name: p.detach() for name, p in trainable(run.model).items()},
        "optimizer": run.optimizer.state_dict(),
        "position": {"epoch": run.epoch, "batch": run.batch, "step": run.step},
        "metrics": {"best": run.best, "last": run.last, "seconds": run.seconds},
        "log_lines": len(runs.read_log(run.folder)),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }


def save(run):
    runs.save_checkpoint(run.folder, checkpoint_state(run))


def restore(run):
    """Put a checkpoint back into a Run that set_up made from the same flags."""
    state = runs.load_checkpoint(run.folder)
    parameters = trainable(run.model)
    if set(parameters) != set(state["parameters"]):
        raise ValueError(f"{run.folder}/checkpoint.pt belongs to other flags than its config.json")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    for name, value in {**state["position"], **state["metrics"]}.items():
        setattr(run, name, value)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    return state["log_lines"]


# --------------------------------------------------------------------------------------------- loop


class NotFinite(RuntimeError):
    """The loss of a step is inf or NaN."""


def learning_rate(step, total, args):
    """Of the step with this index: linear warm-up from 0, then constant or linear to 0.

    The same numbers as transformers' get_constant/linear_schedule_with_warmup.
    """
    if step < args.warmup:
        return args.lr * step / args.warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * max(0.0, (total - step) / max(1, total - args.warmup))


def batch_of(run, examples):
    config = run.model.config
    return data.collate(examples, config.pad_token_id, config.type_vocab_size > 1, run.device)


def train_step(run, group, lr):
    """One optimizer step over a group of batches (lists of indices); returns the mean loss, a
    float."""
    total = sum(map(len, group))
    loss = 0.0
    for indices in group:
        batch = batch_of(run, [run.train[i] for i in indices])
        # mean over the step = sum of batch means, each weighted by its share of the examples
        part = run.model(**batch).loss * (len(indices) / total)
        if not torch.isfinite(part):
            raise NotFinite(f"the loss of step {run.step + 1} is {part.item()}")
        part.backward()
        loss += part.item()
    parameters = [p for p in trainable(run.model).values() if p.grad is not None]
    if run.args.clip:
        torch.nn.utils.clip_grad_norm_(parameters, run.args.clip)
    for settings in run.optimizer.param_groups:
        settings["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss


def epoch_steps(run, epoch):
    """The steps of an epoch: a list of groups of batches of indices, from (seed, epoch) alone."""
    rng = seeds.generator(run.args.seed, f"order/{epoch}")
    batches = data.grouped_by_length(run.train, run.args.batch_size, rng)
    n = run.args.accumulate
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def train(run):
    """From where the run stands to its end, or to Ctrl-C (run.stop)."""
    args = run.args
    per_epoch = len(epoch_steps(run, 0))
    total = per_epoch * args.epochs
    bar = tqdm(total=total, initial=run.step, unit="step", dynamic_ncols=True)
    started, seconds_before = time.monotonic(), run.seconds
    with bar:
        while run.epoch < args.epochs:
            run.model.train()
            seen, epoch_started = 0, time.monotonic()
            for group in epoch_steps(run, run.epoch)[run.batch :]:
                loss = train_step(run, group, learning_rate(run.step, total, args))
                run.batch += 1
                run.step += 1
                seen += sum(map(len, group))
                rate = seen / (time.monotonic() - epoch_started)
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} examples/s", refresh=False)
                if run.step % args.log_every == 0:
                    runs.log(run.folder, "train", step=run.step, epoch=run.epoch, loss=loss)
                run.seconds = seconds_before + time.monotonic() - started
                if run.stop:
                    save(run)
                    return
            run.epoch, run.batch = run.epoch + 1, 0
            run.last = evaluate(run)
            run.seconds = seconds_before + time.monotonic() - started
            headline = run.task.metrics[0]
            if run.best is None or run.last[headline] > run.best[headline]:
                run.best = {**run.last, "epoch": run.epoch}
            runs.log(run.folder, "eval", step=run.step, epoch=run.epoch, **run.last)
            bar.write(f"epoch {run.epoch}: {show(run.last)}")
            save(run)


@torch.inference_mode()
def evaluate(run, limit=None):
    """The task's metrics on the development set, in its own order; the mode of the model is
    kept."""
    training = run.model.training
    run.model.eval()
    predictions, labels = [], []
    for indices in data.in_order(run.dev[:limit], EVAL_BATCH_SIZE):
        batch = batch_of(run, [run.dev[i] for i in indices])
        logits = run.model(
            **{k: v for k, v in batch.items() if k != "labels"}
        ).logits  # (b, labels)
        predictions += (logits.argmax(-1) if run.task.labels else logits[:, 0]).tolist()
        labels += batch["labels"].tolist()
    run.model.train(training)
    return data.metrics(run.task, predictions, labels)


# ------------------------------------------------------------------------------------------- result


def show(metrics):
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "epoch")


def method(args):
    return f"LoRA r={args.r} on {','.join(args.targets)}" if args.targets else "head alone"


def counts(run):
    """(trainable parameters of the adapters that are on, of the head)."""
    per_module = lora.count_trainable(run.model)
    head = sum(n for name, n in per_module.items() if name in run.model.head)
    return sum(per_module.values()) - head, head


def finish(run):
    """Write the adapter and the last line of the log; return the table that is printed."""
    adapters, head = counts(run)
    runs.save_adapter(run.folder, trainable(run.model))
    if not any(line["event"] == "done" for line in runs.read_log(run.folder)):
        runs.log(
            run.folder,
            "done",
            **run.last,
            best=run.best,
            trainable={"adapters": adapters, "head": head},
            seconds=round(run.seconds, 2),
        )
    rows = {
        "method": method(run.args),
        "trainable": f"{adapters:,} in adapters + {head:,} in the head",
        "final": show(run.last),
        "best": f"{show(run.best)} (epoch {run.best['epoch']})",
        "seconds": f"{run.seconds:.1f}",
        "run folder": str(run.folder),
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def dry_run(run):
    """One step and one evaluation batch; nothing is written."""
    loss = train_step(run, epoch_steps(run, 0)[0], run.args.lr)
    metrics = evaluate(run, limit=EVAL_BATCH_SIZE)
    return f"dry run: loss {loss:.4f}, {show(metrics)} on {len(run.dev[:EVAL_BATCH_SIZE])} examples"


def prepare(args):
    """Everything before the first step: a Run, with its folder, new or restored."""
    if args.resume:
        folder = Path(args.resume)
        run = set_up(args)
        run.folder = folder
        lines = restore(run)
        if not args.eval_only:
            runs.truncate_log(folder, lines)
        return run
    run = set_up(args)
    if not args.dry_run:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run.folder = runs.create(args.out or f"runs/{args.task}-{stamp}")
        flags = {k: v for k, v in vars(args).items() if k not in ("resume", "eval_only", "dry_run")}
        runs.write_json(run.folder / "config.json", {"flags": flags, "versions": runs.versions()})
        save(run)
    return run


def stop_on_signal(run):
    """The first Ctrl-C (or SIGTERM) ends the run after its current step; a second one at once."""

    def request(signum, _frame):
        run.stop = True
        signal.signal(signum, signal.default_int_handler)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, request)


def main(argv=None):
    """Exit code: 0 done; 1 the loss is not finite; 2 bad input; 130 interrupted and saved."""
    try:
        args = parse_flags(argv)
        run = prepare(args)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    for note in run.notes:
        print(note)
    if args.dry_run:
        print(dry_run(run))
        return 0
    if args.eval_only:
        print(show(evaluate(run)))
        return 0
    print(
        f"{method(args)} on {args.task}: {len(run.train)} training, {len(run.dev)} development "
        "examples"
    )
    stop_on_signal(run)
    try:
        train(run)
    except NotFinite as error:
        print(
            f"train.py: {error}: the run stops, its last good checkpoint is kept in {run.folder}; "
            "try a smaller --lr, --clip 1 or --warmup 50",
            file=sys.stderr,
        )
        return 1
    if run.stop:
        print(f"stopped and saved; go on with: python train.py --resume {run.folder}")
        return 130
    print(finish(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
