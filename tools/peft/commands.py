"""What the commands do with a PEFT folder: import_folder() and inspect(); export is writing.py's.

What this file does not do: read the command line or print (__main__.py).
"""

from pathlib import Path

from model import load_pretrained
from support import adapter_file, evaluation, glue, report
from support.errors import one_line
from support.run import CannotGoOn
from tools.peft import reading, writing


def import_folder(folder, out, model_name, task=None, data_dir=None):
    """A PEFT folder -> OUT/adapter.safetensors; the text to print.

    Args:
        folder, out: paths. model_name: as of train.py.
        task, data_dir: as of train.py; with a task, its metrics on the development set too.

    A head that neither the folder nor the model has is stored as it is drawn, and said; not of a
    causal model, whose OUT goes onto a language model.

    Raises:
        ValueError, OSError: see reading.read; a task, and no whole head in the folder; a module of
            its head that the model has, and does not train; outputs that are not finite; OUT is not
            empty; see glue.load_task.
    """
    folder, out = Path(folder), Path(out)
    writing.refuse_filled(out)
    if data_dir and not task:
        raise ValueError("--data-dir has no effect without --task: give both, or neither")
    head = reading.read_folder(folder)[2]  # what the config alone refuses needs no model
    if task and not head:
        raise ValueError(f"{folder} holds no head: there is nothing to evaluate on {task}")
    labels = glue.TASKS[task].num_labels if task else reading.labels_of(head)
    model, tokenizer = load_pretrained(model_name, num_labels=labels)
    pairs, head = reading.read(folder, model)
    of_head = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in model.head}
    extra, absent = sorted(head.keys() - of_head), sorted(of_head.keys() - head)
    if extra:
        raise ValueError(
            f"{folder} brings {extra[0]}, which {model_name} has: an adapter file holds what is "
            "trained alone"
        )
    if task and absent:
        raise ValueError(f"{folder} lacks {absent[0]}: there is nothing to evaluate on {task}")
    layers = reading.put(model, pairs, head)
    total = sum(p.count() for p in pairs.values())
    found = f"{len(pairs)} modules, {total:,} parameters"
    if absent and not model.config.causal:
        found += f"\nnot in the folder, stored as drawn: {', '.join(absent)}"
        head |= {name: of_head[name].detach() for name in absent}
    if task:
        _, dev = glue.load_task(task, data_dir)
        examples, _ = glue.encode(dev, tokenizer, min(128, model.config.max_positions))
        try:
            metrics = evaluation.evaluate(model, glue.TASKS[task], examples)
        except CannotGoOn as error:
            raise ValueError(f"{folder} on {task}: {error}") from error
        found += "\n" + report.show(metrics)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"{n}.{key}": t for n, a in layers.items() for key, t in a.factors().items()} | head
    about = {n: {"r": a.r, "scaling": a.scaling, "enabled": True} for n, a in layers.items()}
    for name, layer in layers.items():
        about[name] |= {"kind": layer.kind} if layer.kind != "lora" else {}
    adapter_file.write(out, tensors, about, model.config.shortcut_norm)
    return f"{found}\n{out / 'adapter.safetensors'}"


def inspect(folder, model_name=None):
    """(lines of a table, whether all agrees) of a PEFT folder: module, rank, alpha, ||delta W||.

    Args:
        folder: path.
        model_name: as of train.py; config and tensors are compared with its shapes too.
    """
    config, pairs, head, problems = reading.read_folder(folder)
    if model_name:
        model = reading.shapes_of(model_name, reading.labels_of(head))
        problems += reading.fit(config, pairs, head, model)[2]
    width = max((len(name) for name in pairs), default=6)
    lines = [f"{'module':<{width}} {'r':>4} {'alpha':>8} {'scale':>8} {'params':>9} {'|dW|_F':>10}"]
    for name, pair in sorted(pairs.items()):
        root = pair.r**0.5 if config["use_rslora"] else pair.r
        adalora = config["peft_type"] == "ADALORA"
        alpha = config["lora_alpha"] if adalora else pair.scaling * root
        count = pair.count()
        lines.append(
            f"{one_line(name):<{width}} {pair.r:>4} {alpha:>8g} {pair.scaling:>8.4g} {count:>9,} "
            f"{pair.norm():>10.4g}"
        )
    total = sum(p.count() for p in pairs.values())
    heads = one_line(", ".join(sorted(head)) or "none", 600)
    lines.append(f"{len(pairs)} modules, {total:,} parameters; head: {heads}")
    if config["use_dora"]:
        lines.append("DoRA: |dW|_F is of scale * B A, before each row is given its magnitude")
    return lines + [f"DISAGREES: {one_line(p, 600)}" for p in problems], not problems
