"""Train HeteroLoRA (arXiv 2406.14956), Delta-LoRA (2309.02411) or LoRA: python train.py

Reads in the order of time: set-up, allocation, the loop, evaluation, the result. A run folder
(runs.py) holds all that is needed to go on after an interruption, to the same bits.

    step       one optimizer step, over --accumulate batches of --batch-size examples
    loss       mean over the examples of a step, whatever batches they came in

Under torchrun every process takes its share of each batch (distributed.py).

What this file does not do: build or store a run (state.py), mixed precision, compile, search
hyper-parameters.
"""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from support import distributed, flags, glue, hetero, report, run_folder, run_state, seeds

EVAL_BATCH_SIZE = 64


# --------------------------------------------------------------------------------------- allocation


class CannotGoOn(RuntimeError):
    """A loss or a score that is not a number: the run stops, its last good checkpoint is kept."""


def score_batches(run):
    """The first examples of the training set, the same every time, cut into batches by length.

    Scores do not depend on the cut, and less of the work is padding.
    """
    examples = run.train[: run.args.score_batches * run.args.batch_size]
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))
    chosen = glue.in_order(examples, run.args.batch_size)
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
    if args.proxy == "uniform" or args.per_rank == "yes":  # before step 1: nothing to carry over
        run.optimizer = run_state.make_optimizer(run.model, args)
    adapters, _ = report.counts(run)
    log(run, "score", step=run.step, parameters=adapters, seconds=seconds)
    write_history(run)


def log(run, event, **values):
    """A line of metrics.jsonl, where this process has a run folder to write to."""
    if run.folder:
        run_folder.log(run.folder, event, **values)


def write_history(run):
    """allocation.json: every decision so far."""
    if not run.folder:
        return
    a = run.args
    budget = {"keep": a.keep} if a.budget_params is None else {"parameters": a.budget_params}
    content = {"proxy": a.proxy, "mode": a.allocate, "budget": budget, "costs": run.plan.costs}
    run_folder.write_json(run.folder / "allocation.json", {**content, "history": run.plan.history})


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
    return glue.collate(examples, config.pad_token_id, config.type_vocab_size > 1, device)


def train_step(run, group, lr):
    """One optimizer step over a group of batches (lists of indices) -> the mean loss, a float."""
    total = sum(map(len, group))
    loss = 0.0
    for indices in filter(None, map(distributed.share, group)):
        batch = batch_of(run.model, [run.train[i] for i in indices])
        # mean over the step = sum of batch means, each weighted by its share of the examples
        part = run.model(**batch).loss * (len(indices) / total)
        part.backward()
        loss += part.item()
    on = lora.count_trainable(run.model)  # adapters that are on, and the head
    named = lora.trainable(run.model).items()
    parameters = [p for name, p in named if name.rpartition(".")[0] in on]
    loss, stop = distributed.sum_gradients(parameters, loss, float(run.stop))
    run.stop = stop > 0  # all processes stop after the same step
    if not math.isfinite(loss):
        raise CannotGoOn(f"the loss of step {run.step + 1} is {loss}")
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
    batches = glue.grouped_by_length(run.train, run.args.batch_size, rng)
    n = run.args.accumulate
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def train(run):
    """From where the run stands to its end, or to Ctrl-C (run.stop)."""
    args = run.args
    per_epoch = len(epoch_steps(run, 0))
    total = per_epoch * args.epochs
    quiet = distributed.rank() > 0
    bar = tqdm(total=total, initial=run.step, unit="step", dynamic_ncols=True, disable=quiet)
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
                    log(run, "train", step=run.step, epoch=run.epoch, loss=loss)
                run.seconds = seconds_before + time.monotonic() - started
                if run.stop:
                    run_state.save(run)
                    return
            run.epoch, run.batch = run.epoch + 1, 0
            run.last = evaluate(run.model, run.task, run.dev)
            run.seconds = seconds_before + time.monotonic() - started
            headline = run.task.metrics[0]
            if run.best is None or run.last[headline] > run.best[headline]:
                run.best = {**run.last, "epoch": run.epoch}
            log(run, "eval", step=run.step, epoch=run.epoch, **run.last)
            bar.write(f"epoch {run.epoch}: {report.show(run.last)}")
            run_state.save(run)


@torch.inference_mode()
def predict(model, task, examples):
    """A class id (regression: a score) for each encoded example, in order; the mode is kept."""
    training = model.training
    model.eval()
    # by length: little padding, and shares that are alike
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    mine, found = distributed.share(order), []
    for indices in glue.in_order(mine, EVAL_BATCH_SIZE):
        batch = batch_of(model, [examples[mine[i]] for i in indices])
        del batch["labels"]
        logits = model(**batch).logits  # (b, labels)
        found += (logits.argmax(-1) if task.labels else logits[:, 0]).tolist()
    model.train(training)
    parts = distributed.gather(dict(zip(mine, found, strict=True)))  # index -> prediction
    by_index = {i: prediction for part in parts for i, prediction in part.items()}
    return [by_index[i] for i in range(len(examples))]


def evaluate(model, task, examples):
    """The task's metrics on encoded examples."""
    labels = [example["label"] for example in examples]
    return glue.metrics(task, predict(model, task, examples), labels)


def evaluate_test(run):
    """The test set once, at the end: its metrics, and every prediction (a character for a class).

    No choice looks at them: not the best epoch, not an allocation.
    """
    if run.test is None:
        return
    predictions = predict(run.model, run.task, run.test)
    labels = [example["label"] for example in run.test]
    run.test_metrics = glue.metrics(run.task, predictions, labels)
    separator = "" if run.task.labels else " "
    run.test_predictions = separator.join(map(str, predictions))


# --------------------------------------------------------------------------------------------- main


def dry_run(run):
    """One allocation, one step and one evaluation batch; nothing is written."""
    if run.plan:
        allocate_now(run, print)
    loss = train_step(run, epoch_steps(run, 0)[0], run.args.lr)
    metrics = evaluate(run.model, run.task, run.dev[:EVAL_BATCH_SIZE])
    n = min(EVAL_BATCH_SIZE, len(run.dev))
    return f"dry run: loss {loss:.4f}, {report.show(metrics)} on {n} examples"


def prepare(args, stack):
    """Everything before the first step: a Run, with its folder, new or restored.

    Args:
        args: the flags.
        stack: contextlib.ExitStack that holds the folder's lock. Only the first process has a
            folder.
    """
    writes = distributed.rank() == 0 and not args.eval_only and not args.dry_run
    if args.resume:
        if writes:
            stack.enter_context(run_folder.locked(Path(args.resume)))
        run = run_state.set_up(args)
        stored, note = run_folder.load_checkpoint(Path(args.resume))
        run.notes += [note] if note else []
        if stored:
            run_state.restore(run, stored)
        elif args.eval_only:
            raise ValueError(f"{args.resume} has no checkpoint yet: nothing to evaluate")
        if writes:
            run.folder = Path(args.resume)
            run_folder.truncate_log(run.folder, stored["log_lines"] if stored else 0)
            if run.plan and run.plan.history:
                write_history(run)
        return run
    run = run_state.set_up(args)
    if writes:
        folder = Path(args.out or f"runs/{args.task}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(run_folder.locked(folder))
        run_folder.refuse_filled(folder)
        run.folder = folder
        given = {k: v for k, v in vars(args).items() if k not in ("resume", "eval_only", "dry_run")}
        run_folder.write_json(
            folder / "config.json", {"flags": given, "versions": run_folder.versions()}
        )
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
    """Exit code: 0 done; 1 the run cannot go on; 2 bad input; 130 interrupted and saved."""
    with contextlib.ExitStack() as stack:
        try:
            args = flags.parse_flags(argv)
            distributed.start()
            stack.callback(distributed.stop)
            if distributed.rank():  # the first process alone speaks
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            run = prepare(args, stack)
        except (ValueError, OSError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 2
        for note in run.notes:
            print(note)
        if args.eval_only:
            print(report.show(evaluate(run.model, run.task, run.dev)))
            if run.test is not None:
                evaluate_test(run)
                print(f"test: {report.show(run.test_metrics)}")
            return 0
        return carry_out(run)


def carry_out(run):
    """Train, say how it ended, and return the exit code."""
    args = run.args
    print(report.method(args))
    sizes = f"{len(run.train)} training, {len(run.dev)} development"
    sizes += f", {len(run.test)} test" if run.test is not None else ""
    print(f"{args.task}: {sizes} examples")
    try:
        if args.dry_run:
            print(dry_run(run))
            return 0
        with stop_on_signal(run):
            train(run)
        if not run.stop:
            evaluate_test(run)
        if not run.stop and distributed.rank() == 0:
            print(report.finish(run))
    except CannotGoOn as error:
        print(f"train.py: {error}; try a smaller --lr, --clip 1 or --warmup 50", file=sys.stderr)
        if run.folder and (run.folder / "checkpoint.pt").exists():
            print(f"the last good checkpoint is kept in {run.folder}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"train.py: cannot write the run: {error}; go on from its last checkpoint with "
            f"--resume {run.folder}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"stopped at once; go on from the last checkpoint: --resume {run.folder}")
        return 130
    if run.stop:
        print(f"stopped and saved; go on with: python train.py --resume {run.folder}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
