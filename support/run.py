"""A run in memory, and what of it goes into its folder: log, decisions, checkpoint, result.

    position    epoch (finished ones), step_in_epoch, step (in all)

What this file does not do: train or decide anything (train.py), formats (run_folder.py,
checkpoint.py, adapter_file.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import time
import types
from pathlib import Path

import torch

import allocate
import lora
from delta_lora import DeltaLoRA
from relatives import rank_budget, rank_steps, single_ranks
from support import checkpoint, distributed, glue, report, run_folder, seeds


class CannotGoOn(RuntimeError):
    """A loss or a score that is not a number: the run stops, its last good checkpoint is kept."""


PROGRESS = {  # what a checkpoint says of how far a run is
    "position": ("epoch", "step_in_epoch", "step"),
    "metrics": ("best", "last", "seconds", "score_seconds"),
}


@dataclasses.dataclass
class Run:
    """All that the loop needs; what changes in it is what a checkpoint stores."""

    args: types.SimpleNamespace  # the flags, for train.py alone
    task: object  # glue.Task, or texts.Task
    model: torch.nn.Module
    tokenizer: object
    optimizer: torch.optim.Optimizer
    train: list | None  # encoded examples; None with --eval-only
    dev: list
    test: list | None  # with labels, and asked for
    prompts: dict  # split -> prompts that are answered (texts.Prompt); {} where nothing is written
    device: torch.device
    notes: list  # lines for the person who started the run
    proxy: str = ""  # what the plan's scores come from
    plan: allocate.Reallocator | None = None
    delta: DeltaLoRA | None = None
    allocator: object = None  # of ranks, a relative: METHODS["allocator"]
    ranks: rank_steps.RankSteps | None = None  # single ranks that go on and off
    around: list = dataclasses.field(default_factory=list)  # before_step, after_step; outer first
    folder: Path | None = None
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: dict | None = None  # metrics of the best epoch
    last: dict | None = None
    test_metrics: dict | None = None
    test_predictions: str | None = None
    written: dict = dataclasses.field(default_factory=dict)  # split -> the answers to its prompts
    seconds: float = 0.0
    score_seconds: float = 0.0  # of these, spent on decisions
    asked_to_stop: bool = False  # this process was, by Ctrl-C or SIGTERM
    stop: bool = False  # some process was, and all of them know
    finished: bool = False  # before this process took it up


def log(run, event, **values):
    """A line of metrics.jsonl, where this process has a run folder to write to."""
    if run.folder:
        run_folder.log(run.folder, event, **values)


def write_history(run):
    """allocation.json: every decision so far."""
    if not run.folder:
        return
    plan = run.plan
    budget = {"keep": plan.keep} if plan.budget is None else {"parameters": plan.budget}
    content = {"proxy": run.proxy, "mode": plan.mode, "budget": budget, "costs": plan.costs}
    run_folder.write_json(run.folder / "allocation.json", {**content, "history": plan.history})


def make_plan(model, *, mode, r, keep, budget_params, every, ranking, per_rank, seed):
    """The schedule of decisions over a model's adapters, allocate.Reallocator.

    Args:
        model: with adapters of rank r. mode: static or dynamic.
        keep, budget_params, every, ranking, per_rank, seed: as the flags of these names.

    Raises:
        ValueError: no decision can be taken within the budget.
    """
    counts = lora.count_trainable(model)
    costs = {name: counts[name] for name in lora.adapters(model)}
    if per_rank == "yes" and mode == "dynamic":
        of_one = {name: cost // r for name, cost in costs.items()}
        rank_budget.refuse_less_than_one_each(of_one, budget_params)
    return allocate.Reallocator(
        costs,
        mode=mode,
        keep=keep,
        budget=budget_params,
        every=every,
        together=ranking == "together",
        generator=seeds.generator(seed, "allocation"),
        parts=r if per_rank == "yes" else 1,
    )


def enter_folder(run, stack, *, resume, out, name, stored, data, lines):
    """Give a run its folder: the one that it goes on in, or a new one.

    Args:
        stack: contextlib.ExitStack that holds the lock of a new folder.
        resume: the folder of the run that goes on, or None. out: a new one, or None: by its name.
        name: str, of the task. stored: dict of flags; data: dict split -> fingerprint.
        lines: int, how many lines of its log a run that goes on keeps.

    Raises:
        OSError: it is not empty, in use, or cannot be written.
    """
    if not resume:
        folder = Path(out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        run.folder = run_folder.create(folder, stack, stored, data)
        return
    run.folder = Path(resume)
    if not run.finished:
        run_folder.truncate_log(run.folder, lines)
    if run.plan and run.plan.history:
        write_history(run)


def note_decision(run, r, seconds):
    """Log a decision that took so many seconds, write the history -> what is on, as a grid.

    Args:
        r: int, the rank that modules were injected with.
    """
    layers, budget = lora.adapters(run.model).items(), run.plan.budget
    levels = {n: (a.r - len(a.ranks_off)) / r * a.enabled for n, a in layers}
    spent = counts(run.model)[0]
    log(run, "score", step=run.step, parameters=spent, seconds=seconds)
    write_history(run)
    return allocate.grid(levels, run.plan.costs, budget, spent)


def fingerprints(run, sharded):
    """What a run goes on with only if it is the same: {what: its number of parts and SHA-256}.

    Of "train", "dev" and "test" it is the encoded examples, where they are read; of "config" what
    model it is; of "base" all frozen weights, those under adapters too, unless they are sharded.

    Args:
        run: as set up, before any step. sharded: bool, --shard yes.
    """
    splits = {"train": run.train, "dev": run.dev, "test": run.test}
    found = {name: glue.fingerprint(part) for name, part in splits.items() if part is not None}
    about = dataclasses.asdict(run.model.config)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    found["config"] = {"examples": len(about), "sha256": digest}
    if sharded and distributed.world() > 1:
        return found
    digest, numbers = hashlib.sha256(), 0
    for name, p in sorted(run.model.named_parameters()):
        if not p.requires_grad and ".lora_" not in name:
            digest.update(name.encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            numbers += p.numel()
    return {**found, "base": {"examples": numbers, "sha256": digest.hexdigest()}}


def save(run):
    """Write a checkpoint; every process calls this, the first one writes.

    Raises:
        CannotGoOn: the last step has made a parameter that is not finite.
    """
    if not all(p.isfinite().all() for p in lora.trainable(run.model).values()):
        raise CannotGoOn(f"step {run.step} has made a parameter that is not a number")
    generators = distributed.gather(checkpoint.random_state(run.device))
    if distributed.rank() == 0:
        parts = (run.model, run.optimizer, run.plan, run.delta, run.allocator)
        state = checkpoint.capture(*parts)
        state |= {key: {f: getattr(run, f) for f in fields} for key, fields in PROGRESS.items()}
        lines = len(run_folder.read_log(run.folder))
        checkpoint.write(run.folder, {**state, "generators": generators, "log_lines": lines})


def refuse_lost(folder, state, per_epoch, total):
    """Raises ValueError where a checkpoint says that it is at a step that the run does not have.

    Args:
        folder: for the words. state: of the checkpoint.
        per_epoch, total: int, steps of an epoch and of the run.
    """
    epoch, step_in_epoch, step = (state["position"][key] for key in PROGRESS["position"])
    counted = epoch * per_epoch + step_in_epoch
    known = bool(epoch) == bool(state["metrics"]["last"])
    if step != counted or step_in_epoch > per_epoch or counted > total or not known:
        at = f"step {step}, {step_in_epoch} of epoch {epoch}"
        raise ValueError(f"the checkpoint in {folder} is at {at}: no step of this run")


def restore(run, state, seed):
    """Put a checkpoint back into a Run that was set up from the same flags, seed among them.

    Returns:
        str: what is different about this run, "" if nothing is.

    Raises:
        ValueError: it is the checkpoint of a run with other flags.
    """
    parts = (run.model, run.optimizer, run.plan, run.delta)
    note = checkpoint.restore(state, *parts, run.device, seed, run.allocator)
    for name, value in {**state["position"], **state["metrics"]}.items():
        setattr(run, name, value)
    return note


def counts(model):
    """(trainable parameters of the adapters that are on, of the head, of adapters stored).

    Stored: with what is off but has learned.
    """
    found, kept = lora.count_trainable(model), lora.count_trainable(model, stored=True)
    head = sum(found[module] for module in model.head)
    return sum(found.values()) - head, head, sum(kept.values()) - head


def resume(run, folder, data, seed, evaluating, steps, rebuild):
    """Put a run back to its last checkpoint, if it has one.

    Args:
        run: as it was set up. folder: of the run that goes on. seed: of its flags.
        data: dict split -> fingerprint of what was loaded; a run does not go on with other data.
        evaluating: bool, it is only to be evaluated.
        steps: (in an epoch, in all), or None where the training set was not read.
        rebuild: function () -> the optimizer, anew, once static single ranks have shrunk.

    Returns:
        int, how many lines metrics.jsonl had then.

    Raises:
        ValueError: other data, no checkpoint to evaluate, or one that does not fit.
    """
    other = run_folder.other_data(folder, data)
    if other and not evaluating:
        raise ValueError(f"{other}; a run keeps them: give --data-dir and the model as they were")
    parts = (run.model, run.optimizer, run.plan, run.delta, run.allocator)
    stored, note = checkpoint.read_last(folder, checkpoint.expected(*parts))
    run.notes += filter(None, (other, note))
    if not stored:
        if evaluating:
            raise ValueError(f"{folder} has no checkpoint yet: nothing to evaluate")
        if (folder / "adapter.safetensors").is_file():
            raise ValueError(
                f"{folder} is finished and its checkpoints are gone: nothing can go on; train anew "
                "in another --out, or load its adapter (lora.load_adapter)"
            )
        run.notes.append(f"{folder} has no checkpoint yet: begins at step 0")
        return 0
    if steps:
        refuse_lost(folder, stored, *steps)
    single_ranks.shrink_to(run.model, stored["parameters"])
    run.optimizer = rebuild()
    note = restore(run, stored, seed)
    run.notes += [note] if note and not evaluating else []
    run.finished = run_folder.done_line(folder, stored["log_lines"]) is not None
    return stored["log_lines"]


def beside_prompts(run, again):
    """{split: list of dicts: a prompt, what was written after it, its references}.

    Args:
        again: bool, keep the splits of written.json that were not written to this time.
    """
    before = {}
    if again:
        with contextlib.suppress(OSError, ValueError):  # gone or damaged: it is written anew
            found = run_folder.read_json(run.folder / "written.json")
            before = found if isinstance(found, dict) else {}
    return before | {
        split: [
            {"prompt": prompt.text, "written": text, "references": prompt.references}
            for prompt, text in zip(run.prompts[split], written, strict=True)
        ]
        for split, written in run.written.items()
    }


def finish(run, method, control, baselines):
    """Write the adapter and the last line of the log.

    Args:
        method: str, the method in one line. control: (command, parameters), or None.
        baselines: dict name -> accuracy of what stands beside the result; may be empty.

    Returns:
        the table that is printed.
    """
    pairs = run.delta.export() if run.delta else None
    lora.save_adapter(run.model, run.folder, pairs)
    lines = run_folder.read_log(run.folder)
    before = next((line for line in lines if line["event"] == "done"), {})  # of a finished run
    if run.written:
        run_folder.write_json(run.folder / "written.json", beside_prompts(run, bool(before)))
    adapters, head, stored = counts(run.model)
    first = next((line for line in lines if line["event"] == "eval" and line["step"] == 0), None)
    untouched = first and {name: first[name] for name in run.last if name in first}
    if before and run.test_metrics:  # the same, with the test that is asked for now
        run_folder.truncate_log(run.folder, lines.index(before))
    if not before or run.test_metrics:
        log(
            run,
            "done",
            **run.last,
            dev=run.last,
            test=run.test_metrics,
            test_predictions=run.test_predictions,
            best=run.best,
            **({"untouched": untouched} if untouched else {}),
            trainable={"adapters": adapters, "head": head},
            stored=stored,
            seconds=round(run.seconds, 2),
            score_seconds=round(run.score_seconds, 2),
        )
    return report.table(
        method=method,
        adapters=adapters,
        stored=stored,
        head=head,
        untouched=untouched,
        last=run.last,
        best=run.best,
        test=run.test_metrics or before.get("test"),
        seconds=run.seconds,
        score_seconds=run.score_seconds,
        decisions=len(run.plan.history) if run.plan else 0,
        folder=run.folder,
        control=control,
        baselines=baselines,
    )
