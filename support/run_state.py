"""A run in memory: built from flags, turned into a checkpoint, and put back from one.

What this file does not do: train (train.py), write files (runs.py).
"""

import dataclasses
import os
import types
from pathlib import Path

import torch

import allocate
import lora
from delta_lora import DeltaLoRA
from model import load_pretrained
from support import distributed, glue, hetero, run_folder


def pick_device(name):
    """--device as a torch.device; auto: CUDA if there is one, under torchrun one per process."""
    if name == "auto":
        cuda, local = torch.cuda.is_available(), os.environ.get("LOCAL_RANK", "0")
        return torch.device("cuda", int(local)) if cuda else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}; try cpu") from error
    return device


@dataclasses.dataclass
class Run:
    """All that the loop needs; what changes in it is what a checkpoint stores."""

    args: types.SimpleNamespace
    task: glue.Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train: list  # encoded examples
    dev: list
    device: torch.device
    notes: list  # lines for the person who started the run
    test: list | None = None  # with labels, and asked for
    plan: allocate.Reallocator | None = None
    delta: DeltaLoRA | None = None
    folder: Path | None = None
    epoch: int = 0  # finished ones
    batch: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    best: dict | None = None  # metrics of the best epoch
    last: dict | None = None
    test_metrics: dict | None = None
    test_predictions: str | None = None
    seconds: float = 0.0
    score_seconds: float = 0.0  # of these, spent on scoring
    stop: bool = False  # Ctrl-C was pressed


def set_up(args):
    """Load data and model, inject, build the optimizer. ValueError or OSError on bad input."""
    device, notes = pick_device(args.device), []
    task = glue.TASKS[args.task]
    train_texts, dev_texts = glue.load_task(args.task, args.data_dir)
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
    train_set, cut = glue.encode(train_texts, tokenizer, max_length)
    dev_set, dev_cut = glue.encode(dev_texts, tokenizer, max_length)
    test_set, test_cut = None, 0
    if args.test:
        test_texts, note = glue.load_test(args.task, args.data_dir)
        notes += [note] if note else []
        if test_texts:
            test_set, test_cut = glue.encode(test_texts, tokenizer, max_length)
    cut += dev_cut + test_cut
    if cut:
        notes.append(f"{cut} examples are longer than {max_length} tokens: truncated")
    if task.labels and glue.one_label(dev_texts):
        notes.append("all development examples have one label: the metrics say little")
    if model.fresh:
        notes.append(f"fresh head, not in the checkpoint: {', '.join(model.fresh)}")
    adapt(model, args)
    model.to(device)
    # For dropout, other masks in each process; everything else has a generator of its own.
    torch.manual_seed(args.seed + 1_000_003 * distributed.rank())
    optimizer = make_optimizer(model, args)
    plan, delta = hetero.make_plan(model, args), None
    if args.delta_ratio:
        delta = DeltaLoRA(model, args.delta_ratio, args.delta_start, args.delta_lazy == "yes")
    return Run(
        args, task, model, optimizer, train_set, dev_set, device, notes, test_set, plan, delta
    )


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
        "log_lines": len(run_folder.read_log(run.folder)),
    }


def random_state(device):
    """Where dropout's generators stand, on the CPU and on the device."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def save(run):
    """Write a checkpoint; every process calls this, the first one writes."""
    generators = distributed.gather(random_state(run.device))
    if distributed.rank() == 0:
        state = {**checkpoint_state(run), "generators": generators}
        run_folder.save_checkpoint(run.folder, state)


def restore(run, state):
    """Put a checkpoint back into a Run that set_up made from the same flags.

    Raises:
        ValueError: it belongs to other flags, or to another number of processes.
    """
    for name, layer in lora.adapters(run.model).items():
        stored = state["parameters"].get(f"{name}.lora_A", layer.lora_A)
        if len(stored) < layer.r:  # a static allocation of ranks
            layer.keep_ranks(list(range(len(stored))))
        layer.enabled = state["on"].get(name, True)
    run.optimizer = make_optimizer(run.model, run.args)
    parameters = lora.trainable(run.model)
    if set(parameters) != set(state["parameters"]):
        raise ValueError(f"the checkpoint in {run.folder} belongs to other flags than config.json")
    if len(state["generators"]) != distributed.world():
        raise ValueError(
            f"the run in {run.folder} has {len(state['generators'])} processes, this is "
            f"{distributed.world()}: resume with as many"
        )
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
    generators = state["generators"][distributed.rank()]
    torch.set_rng_state(generators["cpu"])
    if generators["cuda"] is not None:
        torch.cuda.set_rng_state(generators["cuda"], run.device)
