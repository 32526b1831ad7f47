"""adapter.safetensors: what a run trained, in one file.

    tensors     lora_A (r, in) and lora_B (out, r) of every module, and the head, under our names
    metadata    "adapters": {module: {"r", "scaling", "enabled"}}, with "kind" where it is no LoRA
                pair but stored as it is; and in it "shortcut_norm", where that is not "none": the
                library writes two keys in any order, and equal runs are to have equal bytes

The weight of a module that is enabled is W_0 + scaling * B A; one with r = 0 adds nothing. One of
kind "dora" has a tensor lora_magnitude (out,) as well, the norms of its weight's rows.
Enabled is what is in the forward pass: on, or off and frozen.

What this file does not do: other formats (tools/peft).
"""

import json
from pathlib import Path

import safetensors
import safetensors.torch

from support.errors import one_line, shown
from support.form import count, finite, misfit
from support.run_folder import write_atomic

ABOUT = {str: {"r": count, "scaling": finite, "enabled": bool}}


def adapter_path(path):
    """The file itself, of a file or of the folder that it lies in."""
    path = Path(path)
    return path / "adapter.safetensors" if path.is_dir() else path


def write(path, tensors, about, shortcut_norm):
    """Write the file, whole or not at all.

    Args:
        path: the file, or its folder.
        tensors: dict our name -> tensor.
        about: dict module -> {"r", "scaling", "enabled"}.
        shortcut_norm: of the model's config.
    """
    content = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    if shortcut_norm != "none":
        about = {**about, "shortcut_norm": shortcut_norm}
    metadata = {"adapters": json.dumps(about)}
    write_atomic(adapter_path(path), safetensors.torch.save(content, metadata))


def read(path, shortcut_norm):
    """What `write` wrote.

    Args:
        path: the file, or its folder.
        shortcut_norm: of the model that the adapter is for.

    Returns:
        (tensors, about): as given to `write`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no adapter of this program, or one for a model with another shortcut_norm.
    """
    path = adapter_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no adapter at {path}: give the folder of a finished run, or its .safetensors"
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["adapters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no adapter of this program: {shown(error)}") from error
    norm = about.pop("shortcut_norm", "none") if isinstance(about, dict) else "none"
    wrong = misfit(without_kinds(about), ABOUT, "adapters")
    if wrong:
        raise ValueError(f"{path} is no adapter of this program: {wrong}")
    if norm != shortcut_norm:
        raise ValueError(
            f"{path} was trained with shortcut_norm {norm!r}: load the model with that, not "
            f"{shortcut_norm!r}"
        )
    return tensors, about


def without_kinds(about):
    """The same without "kind" where that is a word: a pair, plain LoRA, has none."""
    if not isinstance(about, dict) or not all(isinstance(a, dict) for a in about.values()):
        return about
    pairs = {}
    for name, a in about.items():
        pairs[name] = {k: v for k, v in a.items() if k != "kind" or not isinstance(v, str)}
    return pairs


def refuse_kinds(path, about, kinds, linears):
    """Raises ValueError where a module is of a kind that was not given, or that its place lacks.

    Args:
        about: of the file. kinds: what can be loaded.
        linears: the places of linear layers; a shortcut is a LoRA pair always.
    """
    for name, described in about.items():
        kind = described.get("kind", "lora")
        if kind not in kinds:
            raise ValueError(
                f"{path} holds {one_line(kind)}, which is no LoRA: give load_adapter the class, "
                'relatives.METHODS["adapter"]'
            )
        if kind != "lora" and name.rpartition(".")[2] not in linears:
            raise ValueError(f"{path} says that {name} is {kind}: a shortcut is a LoRA pair")


def refuse_misfit(path, tensors, expected):
    """Raises ValueError that names what is missing, unexpected, misshapen or not finite.

    Args:
        tensors: dict name -> tensor, of the file.
        expected: dict name -> shape.
    """
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        shape, tensor = expected[name], tensors[name]
        if tuple(shape) != tuple(tensor.shape):
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            problems.append(f"{name} is not a tensor of finite numbers")
    if problems:
        said = one_line("; ".join(sorted(problems)[:5]), 500)
        raise ValueError(f"{path} does not fit this model: {said}")
