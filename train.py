"""Train HeteroLoRA (arXiv 2406.14956), Delta-LoRA (2309.02411) or LoRA: python train.py

Reads in the order of time: set-up, allocation, the loop, evaluation, the result. A run folder
(runs.py) holds all that is needed to go on after an interruption, to the same bits.

    step       one optimizer step, over --accumulate batches of --batch-size examples
    loss       mean over the examples of a step, whatever batches they came in

What this file does not do: train on several machines, mixed precision, compile, search
hyper-parameters.
"""

import contextlib
import dataclasses
import signal
import sys
import time
import types
from pathlib import Path

import torch
from tqdm import tqdm

import allocate
import data
import flags
import hetero
import lora
import report
import runs
import seeds
from delta_lora import DeltaLoRA
from model import load_pretrained

EVAL_BATCH_SIZE = 64


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
    plan: allocate.Reallocator | None = None
    delta: DeltaLoRA | None = None
    folder: Path | None = None
    epoch: int = 0  # finished ones
    batch: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    best: dict | None = None  # metrics of the best epoch
    last: dict | None = None
    seconds: float = 0.0
    score_seconds: float = 0.0  # of these, spent on scoring
    stop: bool = False  # Ctrl-C was pressed


def set_up(args):
    """Load data and model, inject, build the optimizer. ValueError or OSError on bad input."""
    device, notes = pick_device(args.device), []
    task = data.TASKS[args.task]
    train_texts, dev_texts = data.load_task(args.task, args.data_dir)
    model, tokenizer = load_pretrained(
        args.model,
        num_labels=task.num_labels,
        dropout=args.dropout,
        seed=args.seed,
        shortcut_norm=args.shortcut_norm,
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
    adapt(model, args)
    model.to(device)
    torch.manual_seed(args.seed)  # for dropout; everything else has a generator of its own
    optimizer = make_optimizer(model, args)
    plan, delta = hetero.make_plan(model, args), None
    if args.delta_ratio:
        delta = DeltaLoRA(model, args.delta_ratio, args.delta_start, args.delta_lazy == "yes")
    return Run(args, task, model, optimizer, train_set, dev_set, device, notes, plan, delta)


def adapt(model, args):
    """Inject what the flags name, and freeze the rest."""
    shortcuts = lora.SHORTCUTS[args.shortcuts]
    if args.targets or shortcuts:
        lora.inject(
            model,
            args.targets,
            r=args.r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            shortcuts=shortcuts,
            shortcut_alpha=args.shortcut_alpha,
            seed=args.seed,
        )
    lora.mark_trainable(model)


def make_optimizer(model, args):
    """AdamW, fused: a few dozen small tensors in one call, where a loop costs 3 % of a step."""
    parameters = lora.trainable(model).values()
    return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def checkpoint_state(run):
    """What a checkpoint holds."""
    return {
        "parameters": {name: p.detach() for name, p in lora.trainable(run.model).items()},
        "optimizer": run.optimizer.state_dict(),
        "position": {"epoch": run.epoch, "batch": run.batch, "step": run.step},
        "metrics": {
            "best": run.best,
            "last": run.last,
            "seconds": run.seconds,
            "score_seconds": run.score_seconds,
        },
        "on": {name: layer.enabled for name, layer in lora.adapters(run.model).items()},
        "plan": run.plan.state() if run.plan else None,
        "delta": run.delta.state() if run.delta else None,
        "log_lines": len(runs.read_log(run.folder)),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }


def save(run):
    runs.save_checkpoint(run.folder, checkpoint_state(run))


def restore(run):
    """Put a checkpoint back into a Run that set_up made from the same flags."""
    state = runs.load_checkpoint(run.folder)
    for name, layer in lora.adapters(run.model).items():
        stored = state["parameters"].get(f"{name}.lora_A", layer.lora_A)
        if len(stored) < layer.r:  # a static allocation of ranks
            layer.keep_ranks(list(range(len(stored))))
        layer.enabled = state["on"].get(name, True)
    run.optimizer = make_optimizer(run.model, run.args)
    parameters = lora.trainable(run.model)
    if set(parameters) != set(state["parameters"]):
        raise ValueError(f"{run.folder}/checkpoint.pt belongs to other flags than its config.json")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    if run.plan:
        run.plan.load(state["plan"])
    if run.delta:
        run.delta.load(state["delta"])
    run.optimizer.load_state_dict(state["optimizer"])
    for name, value in {**state["position"], **state["metrics"]}.items():
        setattr(run, name, value)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    return state["log_lines"]


# --------------------------------------------------------------------------------------- allocation


class CannotGoOn(RuntimeError):
    """A loss or a score that is not a number: the run stops, its last good checkpoint is kept."""


def score_batches(run):
    """The first examples of the training set, the same every time, cut into batches by length.

    Scores do not depend on the cut, and less of the work is padding.
    """
    examples = run.train[: run.args.score_batches * run.args.batch_size]
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))
    chosen = data.in_order(examples, run.args.batch_size)
    return [batch_of(run.model, [examples[i] for i in indices]) for indices in chosen]


def allocate_now(run, say):
    """Decide which modules are on, and write it down."""
    args = run.args
    batches = score_batches(run)
    try:
        seconds = hetero.reallocate(run.model, run.plan, args, batches, run.step, run.epoch, say)
    except ValueError as error:
        raise CannotGoOn(f"step {run.step}: {error}") from error
    run.score_seconds += seconds
    if args.proxy == "uniform" or args.per_rank == "yes":
        run.optimizer = make_optimizer(run.model, args)  # of the shrunken parameters; before step 1
    if run.folder:
        adapters, _ = report.counts(run)
        runs.log(run.folder, "score", step=run.step, parameters=adapters, seconds=seconds)
        write_history(run)


def write_history(run):
    """allocation.json: every decision so far."""
    a = run.args
    budget = {"keep": a.keep} if a.budget_params is None else {"parameters": a.budget_params}
    content = {"proxy": a.proxy, "mode": a.allocate, "budget": budget, "costs": run.plan.costs}
    runs.write_json(run.folder / "allocation.json", {**content, "history": run.plan.history})


# --------------------------------------------------------------------------------------------- loop


def learning_rate(step, total, args):
    """Of the step with this index: linear warm-up from 0, then constant or linear to 0.

    The same numbers as transformers' get_constant/linear_schedule_with_warmup.
    """
    if step < args.warmup:
        return args.lr * step / args.warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * max(0.0, (total - step) / max(1, total - args.warmup))


def batch_of(model, examples):
    """Examples as a batch on the model's device."""
    config, device = model.config, model.word_embeddings.weight.device
    return data.collate(examples, config.pad_token_id, config.type_vocab_size > 1, device)


def train_step(run, group, lr):
    """One optimizer step over a group of batches (lists of indices) -> the mean loss, a float."""
    total = sum(map(len, group))
    loss = 0.0
    for indices in group:
        batch = batch_of(run.model, [run.train[i] for i in indices])
        # mean over the step = sum of batch means, each weighted by its share of the examples
        part = run.model(**batch).loss * (len(indices) / total)
        if not torch.isfinite(part):
            raise CannotGoOn(f"the loss of step {run.step + 1} is {part.item()}")
        part.backward()
        loss += part.item()
    parameters = [p for p in lora.trainable(run.model).values() if p.grad is not None]
    if run.args.clip:
        torch.nn.utils.clip_grad_norm_(parameters, run.args.clip)
    for settings in run.optimizer.param_groups:
        settings["lr"] = lr
    if run.delta:
        run.delta.before_step()
    run.optimizer.step()
    if run.delta:
        run.delta.after_step()
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
                if run.plan and run.plan.due(run.step, run.batch, per_epoch):
                    allocate_now(run, bar.write)
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
            run.last = evaluate(run.model, run.task, run.dev)
            run.seconds = seconds_before + time.monotonic() - started
            headline = run.task.metrics[0]
            if run.best is None or run.last[headline] > run.best[headline]:
                run.best = {**run.last, "epoch": run.epoch}
            runs.log(run.folder, "eval", step=run.step, epoch=run.epoch, **run.last)
            bar.write(f"epoch {run.epoch}: {report.show(run.last)}")
            save(run)


@torch.inference_mode()
def evaluate(model, task, examples):
    """The task's metrics on encoded examples; the model's mode is kept."""
    training = model.training
    model.eval()
    predictions, labels = [], []
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))  # little padding
    for indices in data.in_order(examples, EVAL_BATCH_SIZE):
        batch = batch_of(model, [examples[i] for i in indices])
        labels += batch.pop("labels").tolist()
        logits = model(**batch).logits  # (b, labels)
        predictions += (logits.argmax(-1) if task.labels else logits[:, 0]).tolist()
    model.train(training)
    return data.metrics(task, predictions, labels)


# --------------------------------------------------------------------------------------------- main


def dry_run(run):
    """One allocation, one step and one evaluation batch; nothing is written."""
    if run.plan:
        allocate_now(run, print)
    loss = train_step(run, epoch_steps(run, 0)[0], run.args.lr)
    metrics = evaluate(run.model, run.task, run.dev[:EVAL_BATCH_SIZE])
    n = min(EVAL_BATCH_SIZE, len(run.dev))
    return f"dry run: loss {loss:.4f}, {report.show(metrics)} on {n} examples"


def prepare(args):
    """Everything before the first step: a Run, with its folder, new or restored."""
    if args.resume:
        folder = Path(args.resume)
        run = set_up(args)
        run.folder = folder
        lines = restore(run)
        if not args.eval_only:
            runs.truncate_log(folder, lines)
            if run.plan and run.plan.history:
                write_history(run)
        return run
    run = set_up(args)
    if not args.dry_run:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run.folder = runs.create(args.out or f"runs/{args.task}-{stamp}")
        given = {k: v for k, v in vars(args).items() if k not in ("resume", "eval_only", "dry_run")}
        runs.write_json(run.folder / "config.json", {"flags": given, "versions": runs.versions()})
        save(run)
    return run


@contextlib.contextmanager
def stop_on_signal(run):
    """The first Ctrl-C (or SIGTERM) ends the run after its current step; a second one at once."""

    def request(signum, _frame):
        run.stop = True
        signal.signal(signum, signal.default_int_handler)

    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv=None):
    """Exit code: 0 done; 1 loss or score not finite; 2 bad input; 130 interrupted and saved."""
    try:
        args = flags.parse_flags(argv)
        run = prepare(args)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    for note in run.notes:
        print(note)
    if args.eval_only:
        print(report.show(evaluate(run.model, run.task, run.dev)))
        return 0
    print(report.method(args))
    print(f"{args.task}: {len(run.train)} training, {len(run.dev)} development examples")
    try:
        if args.dry_run:
            print(dry_run(run))
            return 0
        with stop_on_signal(run):
            train(run)
    except CannotGoOn as error:
        print(f"train.py: {error}; try a smaller --lr, --clip 1 or --warmup 50", file=sys.stderr)
        if run.folder:
            print(f"the last good checkpoint is kept in {run.folder}", file=sys.stderr)
        return 1
    if run.stop:
        print(f"stopped and saved; go on with: python train.py --resume {run.folder}")
        return 130
    print(report.finish(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
