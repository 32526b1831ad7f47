"""What a run says and leaves at its end: the method in words, the table, the adapter file.

What this file does not do: measure anything (train.py).
"""

import lora
from support import flags, run_folder


def show(metrics):
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "epoch")


def method(args):
    """The method in one line."""
    places = [p for p in (",".join(args.targets), f"{args.shortcuts} shortcuts") if p]
    places = [p for p in places if p != "none shortcuts"]
    if not places:
        return "head alone"
    name = f"LoRA r={args.r} on {' + '.join(places)}"
    if args.delta_ratio:
        lazy = ", lazy" if args.delta_lazy == "yes" else ""
        name = f"Delta-LoRA lambda={args.delta_ratio:g} K={args.delta_start}{lazy}: {name}"
    if args.allocate == "none":
        return name
    budget = (
        f"keep {args.keep}" if args.budget_params is None else f"{args.budget_params:,} parameters"
    )
    return f"{args.allocate} HeteroLoRA, {args.proxy}, {budget}: {name}"


def counts(run):
    """(trainable parameters of the adapters that are on, of the head)."""
    per_module = lora.count_trainable(run.model)
    head = sum(n for name, n in per_module.items() if name in run.model.head)
    return sum(per_module.values()) - head, head


def finish(run):
    """Write the adapter and the last line of the log; return the table that is printed."""
    adapters, head = counts(run)
    save_adapter(run)
    if not any(line["event"] == "done" for line in run_folder.read_log(run.folder)):
        run_folder.log(
            run.folder,
            "done",
            **run.last,
            dev=run.last,
            test=run.test_metrics,
            test_predictions=run.test_predictions,
            best=run.best,
            trainable={"adapters": adapters, "head": head},
            seconds=round(run.seconds, 2),
            score_seconds=round(run.score_seconds, 2),
        )
    rows = {
        "method": method(run.args),
        "trainable": f"{adapters:,} in adapters + {head:,} in the head",
        "final": show(run.last),
        "best": f"{show(run.best)} (epoch {run.best['epoch']})",
        **({"test": show(run.test_metrics)} if run.test_metrics else {}),
        "seconds": f"{run.seconds:.1f}",
    }
    if run.plan:
        share = run.score_seconds / max(run.seconds, 1e-9)
        rows["seconds"] += f", {run.score_seconds:.1f} of them ({share:.0%}) for scoring"
        rows["allocated"] = f"{len(run.plan.history)} times; python tools/plot.py {run.folder}"
    rows["run folder"] = str(run.folder)
    if run.plan and run.args.proxy != "uniform":
        rows["same budget, spread evenly"] = uniform_command(run, adapters)
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def save_adapter(run):
    """adapter.safetensors: A, B and head; for Delta-LoRA the pairs that hold W's change too."""
    tensors, layers = lora.trainable(run.model), lora.adapters(run.model)
    exported = run.delta.export() if run.delta else {}
    about = {
        name: {"r": a.r, "scaling": a.scaling, "enabled": a.enabled} for name, a in layers.items()
    }
    for name, (lora_A, lora_B) in exported.items():
        tensors |= {f"{name}.lora_A": lora_A, f"{name}.lora_B": lora_B}
        about[name] = {"r": len(lora_A), "scaling": 1.0, "enabled": len(lora_A) > 0}
    run_folder.save_adapter(run.folder, tensors, about)


def uniform_command(run, budget):
    """The command of the baseline that spends the same parameters on every module alike."""
    a = run.args
    given = {"task": a.task, "data-dir": a.data_dir, "seed": a.seed, "allocate": "static"}
    given |= {"proxy": "uniform", "budget-params": budget}
    for name, (_, default, _) in flags.FLAGS.items():
        value = getattr(a, name.replace("-", "_"))
        allocation = ("keep", "every", "score-batches", "rank", "per-rank", "out", "device")
        if name not in given and name not in allocation and value != default:
            given[name] = ",".join(value) if isinstance(value, list) else value
    text = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    return f"\n  python train.py {text}"
