"""PEFT adapters out and in: python tools/peft_io.py export RUN DIR | import DIR OUT | inspect DIR

    export RUN DIR      a finished run as a PEFT adapter folder (peft_out.py)
    import DIR OUT      a PEFT LoRA folder as our adapter.safetensors, checked against --model;
                        with --task, its metric on the development set
    inspect DIR         module, rank, alpha, scale, parameters, ||delta W||_F, from tensors and
                        config; exit code 1 where they disagree

prepare() gives a transformers model of the BERT kind the places that our shortcuts need.

What this file does not do: the formats themselves (peft_out.py, peft_in.py).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import lora
import train
from model import load_pretrained
from support import adapter_file, glue, report, run_folder
from tools.peft import reading, writing


def import_(folder, out, model_name, task=None, data_dir=None, num_labels=2):
    """A PEFT folder -> OUT/adapter.safetensors; the text to print.

    Raises:
        ValueError, OSError: see reading.read; OUT is not empty; see glue.load_task.
    """
    out = Path(out)
    if out.is_dir():
        run_folder.refuse_filled(out)
    labels = glue.TASKS[task].num_labels if task else num_labels
    model, tokenizer = load_pretrained(model_name, num_labels=labels)
    pairs, head = reading.read(folder, model)
    layers = reading.put(model, pairs, head)
    total = sum(p.lora_A.numel() + p.lora_B.numel() for p in pairs.values())
    found = f"{len(pairs)} modules, {total:,} parameters"
    if task:
        _, dev = glue.load_task(task, data_dir)
        examples, _ = glue.encode(dev, tokenizer, min(128, model.config.max_positions))
        found += "\n" + report.show(train.evaluate(model, glue.TASKS[task], examples))
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"{n}.lora_A": a.lora_A for n, a in layers.items()} | head
    tensors |= {f"{n}.lora_B": a.lora_B for n, a in layers.items()}
    about = {n: {"r": a.r, "scaling": a.scaling, "enabled": True} for n, a in layers.items()}
    adapter_file.write(out, tensors, about, model.config.shortcut_norm)
    return f"{found}\n{out / 'adapter.safetensors'}"


def inspect(folder):
    """(lines of a table, whether config and tensors agree) of a PEFT folder."""
    config, pairs, head, problems = reading.read_folder(folder)
    width = max((len(name) for name in pairs), default=6)
    lines = [f"{'module':<{width}} {'r':>4} {'alpha':>8} {'scale':>8} {'params':>9} {'|dW|_F':>10}"]
    for name, pair in sorted(pairs.items()):
        root = pair.r**0.5 if config.get("use_rslora") else pair.r
        alpha, count = pair.scaling * root, pair.lora_A.numel() + pair.lora_B.numel()
        lines.append(
            f"{name:<{width}} {pair.r:>4} {alpha:>8g} {pair.scaling:>8.4g} {count:>9,} "
            f"{pair.norm():>10.4g}"
        )
    total = sum(p.lora_A.numel() + p.lora_B.numel() for p in pairs.values())
    heads = ", ".join(sorted(head)) or "none"
    lines.append(f"{len(pairs)} modules, {total:,} parameters; head: {heads}")
    return lines + [f"DISAGREES: {p}" for p in problems], not problems


# ------------------------------------------------------------------------------------------ prepare


def prepare(model, shortcut_names):
    """Give a transformers BERT or RoBERTa model the places of our shortcuts, in place.

    In each layer that is named a frozen nn.Linear: the identity for residual_1 and residual_2, zero
    for shortcut_sa and shortcut_ffn, so the model computes the same. PEFT adapts them like any
    other layer, and loads what `export --keep-shortcuts` wrote.

    Args:
        model: a transformers model with bert.encoder.layer or roberta.encoder.layer.
        shortcut_names: full paths such as "bert.encoder.layer.0.residual_1".

    Raises:
        ValueError: a path that is no such place.
    """
    wanted = {}
    for path in shortcut_names:
        parent, _, place = path.rpartition(".")
        if ".encoder.layer." not in path or place not in lora.RESIDUALS + lora.CROSS:
            raise ValueError(f"{path} is no place for a shortcut in a BERT or RoBERTa model")
        wanted.setdefault(parent, []).append(place)
    previous = {}  # the FFN input of the layer before, during a forward pass
    layers = model.get_submodule(next(iter(wanted)).rpartition(".")[0])
    for i, layer in enumerate(layers):
        for place in wanted.get(f"{model.base_model_prefix}.encoder.layer.{i}", ()):
            d = model.config.hidden_size
            linear = nn.Linear(d, d, bias=False).to(layer.output.dense.weight).requires_grad_(False)
            eye = torch.eye(d) if place in lora.RESIDUALS else torch.zeros(d, d)
            linear.weight.data.copy_(eye)
            setattr(layer, place, linear)
        add_hooks(layer, previous)
    return model


def add_hooks(layer, previous):
    """The four places in the forward pass of one BertLayer (model.Block.forward, post-LN)."""

    def around(place):
        return lambda _m, inputs: (inputs[0], getattr(layer, place)(inputs[1]))

    def into_ffn(_module, _inputs, output):
        x = output[0]
        if hasattr(layer, "shortcut_ffn"):
            x = x + layer.shortcut_ffn(previous["ffn_input"])
        previous["ffn_input"] = x
        return (x, *output[1:])

    def into_next(_module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        x = x + layer.shortcut_sa(inputs[0])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    if hasattr(layer, "residual_1"):
        layer.attention.output.register_forward_pre_hook(around("residual_1"))
    if hasattr(layer, "residual_2"):
        layer.output.register_forward_pre_hook(around("residual_2"))
    layer.attention.register_forward_hook(into_ffn)
    if hasattr(layer, "shortcut_sa"):
        layer.register_forward_hook(into_next)


# --------------------------------------------------------------------------------------------- main


def main(argv=None):
    """Exit code: 0 done; 1 inspect found a disagreement; 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="RUN -> PEFT adapter folder")
    out.add_argument("run", type=Path)
    out.add_argument("folder", type=Path)
    out.add_argument("--pad", action="store_true", help="one rank for all modules, with zeros")
    out.add_argument("--drop-shortcuts", action="store_true", help="leave out shortcuts of zero")
    out.add_argument("--keep-shortcuts", action="store_true", help="for a model after prepare()")
    into = commands.add_parser("import", help="PEFT adapter folder -> OUT/adapter.safetensors")
    into.add_argument("folder", type=Path)
    into.add_argument("out", type=Path)
    into.add_argument("--model", default="minilm", help="as of train.py (default: minilm)")
    into.add_argument("--task", choices=list(glue.TASKS), help="evaluate on this task too")
    into.add_argument("--data-dir")
    into.add_argument("--num-labels", type=int, default=2, help="without --task (default: 2)")
    look = commands.add_parser("inspect", help="a table; exit code 1 on a disagreement")
    look.add_argument("folder", type=Path)
    a = parser.parse_args(argv)
    try:
        if a.command == "export":
            writing.export(a.run, a.folder, a.pad, a.drop_shortcuts, a.keep_shortcuts)
            print("\n".join([*inspect(a.folder)[0], str(a.folder)]))
        elif a.command == "import":
            print(import_(a.folder, a.out, a.model, a.task, a.data_dir, a.num_labels))
        else:
            lines, agree = inspect(a.folder)
            print("\n".join(lines))
            return 0 if agree else 1
    except (ValueError, OSError) as error:
        print(f"peft_io.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
