"""Train HeteroLoRA (arXiv 2406.14956), Delta-LoRA (2309.02411) or LoRA: python train.py

Reads in the order of time: set-up, a decision, the loop, the run.

    word       | meaning
    step       | one optimizer step, over --accumulate batches of --batch-size examples
    loss       | mean over the examples of a step, whatever batches they came in; of text tasks over
               | all predicted tokens
    decision   | which modules are on: score, choose, switch; before a step, never inside one;
               | that of step n comes after n of them
    position   | epoch, the number of finished ones; step_in_epoch; step, of all epochs
    plan       | allocate.Reallocator, of HeteroLoRA; an allocator is that of a relative

A run folder (support/run_folder.py) holds all that is needed to go on after an interruption, to the
same bits. Under torchrun every process takes its share of each batch (support/distributed.py).

What this file does not do: compile, search hyper-parameters (tools/compare.py does), load or shard
a model (model.py, support/large.py).
"""

import contextlib
import functools
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import allocate
import lora
import proxies
from delta_lora import DeltaLoRA
from model import load_pretrained
from relatives import METHODS, rank_steps, single_ranks
from support import distributed, flags, glue, large, report, run_folder, seeds, tasks, terminal
from support import evaluation as measures
from support import run as runs
from support.errors import one_line
from support.evaluation import EVAL_BATCH_SIZE, batch_of, better, counted, evaluate
from support.run import CannotGoOn, Run
from support.settings import effects

# ------------------------------------------------------------------------------------------- set-up


def set_up(args):
    """Load model and data, inject, build the optimizer. ValueError or OSError on bad input."""
    device, task = distributed.pick_device(args.device), tasks.TASKS[args.task]
    decides = args.allocate in ("static", "dynamic")
    splits, notes = tasks.load(args.task, args.data_dir, args.test, not args.eval_only, args.seed)
    folder = tasks.model_folder(args.task, args.model, args.proxy if decides else "")
    how = named(args, "dropout", "seed", "shortcut_norm", "base_dtype")
    model, tokenizer = load_pretrained(str(folder), task.num_labels, task.head, **how)
    how = named(args, "max_length", "train_records", "eval_records")
    data, more = tasks.encode(args.task, splits, tokenizer, model.config, folder, **how)
    notes += more
    if model.fresh and not args.resume:
        notes.append(f"fresh head, not in the checkpoint: {', '.join(model.fresh)}")
    shortcuts = lora.SHORTCUTS[args.shortcuts]
    allocator = METHODS["allocator"].get(args.allocate)
    if args.targets or shortcuts:
        kind = allocator.adapter if allocator else METHODS["adapter"][args.adapter]
        how = named(args, "r", "lora_alpha", "lora_dropout", "shortcut_alpha", "seed", "when_off")
        lora.inject(model, args.targets, shortcuts=shortcuts, adapter=kind, **how)
    lora.mark_trainable(model)
    notes += large.place(model, device, args.shard == "yes", args.resume)
    # For dropout, other masks in each process; everything else has a generator of its own.
    torch.manual_seed(args.seed + 1_000_003 * distributed.rank())
    dynamic_ranks = args.per_rank == "yes" and args.allocate == "dynamic"
    by_rank = dynamic_ranks or (allocator and allocator.single_ranks)
    ranks = rank_steps.RankSteps(model) if by_rank else None
    optimizer = make_optimizer(model, args, ranks)
    run = Run(args, task, model, tokenizer, optimizer, *data, device, notes, ranks=ranks)
    if decides:
        how = named(args, "r", "keep", "budget_params", "every", "ranking", "per_rank", "seed")
        run.plan, run.proxy = runs.make_plan(model, mode=args.allocate, **how), args.proxy
    if args.delta_ratio:
        lazy = args.delta_lazy == "yes"
        if args.delta_start is None:
            args.delta_start = 0 if args.eval_only else len(epoch_steps(run, 0)) // 3
        run.delta = DeltaLoRA(model, ratio=args.delta_ratio, start=args.delta_start, lazy=lazy)
    run.allocator = allocator and allocator(model, **around_steps(run))
    run.around = [x for x in (run.delta, run.allocator, run.ranks) if x]
    return run


def named(args, *names):
    """These flags alone, for a function that takes them by name."""
    return {name: getattr(args, name) for name in names}


def make_optimizer(model, args, ranks=None):
    """--optimizer over all that trains; of single ranks that go on and off always AdamW."""
    if ranks:
        return ranks.adamw(args.lr, args.weight_decay)
    return METHODS["optimizer"][args.optimizer](model, args.lr, args.weight_decay)


def around_steps(run):
    """What an allocator may ask for, by name: the schedule, the data, the optimizer's moments."""
    args, per_epoch = run.args, len(epoch_steps(run, 0)) if run.train else 1
    return {
        "steps": per_epoch * args.epochs,
        "per_epoch": per_epoch,
        "interval": allocate.interval(args.every, per_epoch),
        "keep": args.keep,
        "batches": lambda: score_batches(run),
        "generator": seeds.generator(args.seed, "allocation"),
        "parts": run.ranks and run.ranks.parts,
        "forget": lambda parameter: run.optimizer.state.pop(parameter, None),
    }


# --------------------------------------------------------------------------------------- a decision


def decide(run):
    """One decision of HeteroLoRA: score, choose, switch; said and written down.

    Raises:
        CannotGoOn: a score that is not finite, or a proxy that does not go with the model.
    """
    args, model, started = run.args, run.model, time.monotonic()
    batches = score_batches(run)
    try:
        if args.per_rank == "yes":
            single_ranks.decide(model, run.plan, args.proxy, batches, run.step, run.epoch)
            if not run.ranks:  # static: A and B are new, smaller ones
                run.optimizer = make_optimizer(model, args)
        else:
            scores = score(run, batches)
            on = run.plan.choose(scores, run.step, run.epoch)
            lora.switch(model, on)
    except ValueError as error:
        raise CannotGoOn(f"step {run.step}: {error}") from error
    seconds = time.monotonic() - started
    run.score_seconds += seconds
    tqdm.write(f"step {run.step}: {args.proxy} chose")
    tqdm.write(runs.note_decision(run, args.r, seconds))


def score(run, batches):
    """The score of every module by --proxy, or of a baseline; the same on every process."""
    if run.args.proxy in allocate.BASELINES:
        return allocate.baseline_scores(run.args.proxy, run.plan.costs, run.plan.generator)
    return distributed.mean_scores(proxies.score(run.args.proxy, run.model, batches))


def score_batches(run):
    """The first examples of the training set, the same every time, cut into batches by length.

    No score but synflow_released's depends on the cut, and less of the work is padding.
    """
    examples = run.train[: run.args.score_batches * run.args.batch_size]
    examples = sorted(examples, key=lambda e: len(e["input_ids"]))
    cuts = glue.in_order(examples, run.args.batch_size)
    return terminal.Watched(batch_of(run.model, [examples[i] for i in cut]) for cut in cuts)


# --------------------------------------------------------------------------------------------- loop


def learning_rate(step, total, lr, schedule, warmup):
    """Of the step with this index: linear warm-up from 0, then constant or linear to 0.

    The same numbers as transformers' get_constant/linear_schedule_with_warmup.
    """
    if step < warmup:
        return lr * step / warmup
    if schedule == "constant":
        return lr
    return lr * max(0.0, (total - step) / max(1, total - warmup))


def train_step(run, group, lr):
    """One optimizer step over a group of batches (lists of indices) -> the mean loss, a float.

    Raises:
        CannotGoOn: the loss is not finite; nothing has moved.
    """
    total = sum(counted([run.train[i] for i in indices]) for indices in group)
    loss = 0.0
    for indices, once in map(distributed.part, group):
        examples = [run.train[i] for i in indices]
        # mean over the step = sum of batch means, each weighted by its share of what is counted
        weight = once * counted(examples) / total
        share = run.model(**batch_of(run.model, examples)).loss * weight
        share.backward()
        loss += share.item()
    parameters = list(lora.training_now(run.model).values())
    asked = run.asked_to_stop or distributed.orphaned()
    loss, stop = distributed.sum_gradients(parameters, loss, float(asked))
    run.stop = stop > 0  # all processes stop after the same step
    if not math.isfinite(loss):
        raise CannotGoOn(f"the loss of step {run.step + 1} is {loss}")
    if run.args.clip:
        torch.nn.utils.clip_grad_norm_(parameters, run.args.clip)
    for settings in run.optimizer.param_groups:
        settings["lr"] = lr * settings.get("lr_ratio", 1)
    for rule in run.around:
        rule.before_step()
    run.optimizer.step()
    for rule in reversed(run.around):
        rule.after_step()
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
    bar = tqdm(total=total, initial=run.step, unit="step", dynamic_ncols=True)
    started, seconds_before = time.monotonic(), run.seconds
    with bar:
        while run.epoch < args.epochs:
            run.model.train()
            seen, epoch_started = 0, time.monotonic()
            for group in epoch_steps(run, run.epoch)[run.step_in_epoch :]:
                if run.plan and run.plan.due(run.step, run.step_in_epoch, per_epoch):
                    decide(run)
                lr = learning_rate(run.step, total, args.lr, args.schedule, args.warmup)
                loss = train_step(run, group, lr)
                run.step_in_epoch += 1
                run.step += 1
                seen += sum(map(len, group))
                rate = seen / (time.monotonic() - epoch_started)
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:.3g} examples/s", refresh=False)
                if run.step % args.log_every == 0:
                    change = {"weight_change": run.delta.weight_change()} if run.delta else {}
                    runs.log(run, "train", step=run.step, epoch=run.epoch, loss=loss, **change)
                run.seconds = seconds_before + time.monotonic() - started
                if run.stop:
                    runs.save(run)
                    return
            run.epoch, run.step_in_epoch = run.epoch + 1, 0
            run.last = evaluate(run.model, run.task, run.dev)
            run.seconds = seconds_before + time.monotonic() - started
            if run.best is None or better(run.task, run.last, run.best):
                run.best = {**run.last, "epoch": run.epoch}
            runs.log(run, "eval", step=run.step, epoch=run.epoch, **run.last)
            bar.write(f"epoch {run.epoch}: {report.show(run.last)}")
            runs.save(run)


# --------------------------------------------------------------------------------------------- main


def prepare(args, stack):
    """Everything before the first step: a Run, with its folder, new or restored.

    Args:
        args: the flags.
        stack: contextlib.ExitStack that holds the folder's lock. Only the first process has a
            folder.
    """
    writes = distributed.rank() == 0 and not args.eval_only and not args.dry_run
    if args.resume and writes:
        stack.enter_context(run_folder.locked(Path(args.resume)))
    run = set_up(args)
    data = runs.fingerprints(run, args.shard == "yes")
    lines = 0
    if args.resume:
        per_epoch = 0 if args.eval_only else len(epoch_steps(run, 0))
        steps = None if args.eval_only else (per_epoch, per_epoch * args.epochs)
        rebuild = functools.partial(make_optimizer, run.model, args, run.ranks)
        where = (Path(args.resume), data, args.seed, args.eval_only)
        lines = runs.resume(run, *where, steps, rebuild)
    if not args.eval_only:
        parameters = sum(lora.count_trainable(run.model).values())
        run.notes += effects(args, examples=len(run.train), parameters=parameters, plan=run.plan)
    if writes:
        new = {"out": args.out, "name": args.task, "stored": flags.stored(args), "data": data}
        runs.enter_folder(run, stack, resume=args.resume, **new, lines=lines)
    return run


def dry_run(run):
    """One decision, one step and one evaluation batch; nothing is written."""
    if run.plan:
        decide(run)
    loss = train_step(run, epoch_steps(run, 0)[0], run.args.lr)
    metrics = evaluate(run.model, run.task, run.dev[:EVAL_BATCH_SIZE])
    n = min(EVAL_BATCH_SIZE, len(run.dev))
    return f"dry run: loss {loss:.4f}, {report.show(metrics)} on {n} examples; nothing is written"


def main(argv=None):
    """Exit code: 0 done; 1 the run cannot go on; 2 bad input; 130 interrupted, saved if it trained.

    Of several processes the first one has it, the others 0: if another one ended with an error
    before it, torchrun would kill the first one while it still says what is wrong.
    """
    terminal.show_what_can_be_shown()
    with contextlib.ExitStack() as stack:
        try:
            distributed.start()
            stack.callback(distributed.stop)
            if distributed.rank():
                stack.enter_context(terminal.silent())  # the first process alone speaks
            with distributed.together():
                args = flags.parse_flags(argv, tasks.default)
                run = prepare(args, stack)
        except (ValueError, OSError) as error:
            print(f"train.py: {one_line(error, 600)}", file=sys.stderr)
            return 0 if distributed.rank() else 2
        except KeyboardInterrupt:  # before there is anything to save
            return 0 if distributed.rank() else 130
        stack.enter_context(terminal.warnings_as_notes())
        begin = evaluate_only if args.eval_only else carry_out
        code = terminal.carry_through(run, lambda: begin(run))
        return 0 if distributed.rank() else code


def evaluate_only(run):
    """--eval-only: the metrics of a run, or of a model, as it stands, and of what."""
    source = functools.partial(tasks.source, run.args.task, run.args.data_dir)
    print(measures.as_it_stands(run, source))


def carry_out(run):
    """Train to the end, or to a signal; write and print the result."""
    args = run.args
    print(flags.describe(args))
    print(f"{args.task}: {glue.sizes(run.train, run.dev, run.test)}")
    if args.dry_run:
        print(dry_run(run))
        return
    print(measures.of_untouched(run), end="")
    with terminal.stop_on_signal(run):
        train(run)
    run.stop = distributed.sum_numbers([run.stop or run.asked_to_stop])[0] > 0
    if run.stop:
        return
    print(measures.at_the_end(run), end="")
    if distributed.rank() == 0:
        spent = runs.counts(run.model)[0]
        control = run.plan and flags.equal_budget_control(args, spent, run.plan.costs)
        how = named(args, "task", "data_dir", "model", "train_records", "eval_records")
        print(runs.finish(run, flags.describe(args), control, glue.baselines(**how)))
        print(measures.answered(run), end="")


if __name__ == "__main__":
    sys.exit(main())
