"""checkpoint.pt: everything that a resumed run needs to end with the same bits.

    checkpoint.pt            the state; its last 32 bytes are the SHA-256 of the rest
    checkpoint.previous.pt   the one before it, for when that one is damaged

    key             | content
    parameters      | every lora_A and lora_B, on or off, and the head
    optimizer       | moments and step counts
    on, ranks_off   | which modules are on, and which of their rank-one parts are off
    plan            | decisions so far, and the generator of the ties
    delta           | Delta-LoRA: t, the stretches, and the moved weights themselves
    allocator       | a relative that allocates ranks: its scores, masks, step count
    position        | epoch, step_in_epoch, step
    metrics         | last, best, seconds
    generators      | where dropout's generators stand, of every process
    log_lines       | how many lines of metrics.jsonl were written before

Code in the file is never executed (weights_only). What was read is checked before anything is made
of it: against FORM, and, to go on with a run, against what that run has (like).

What this file does not do: the frozen weights (they are reloaded), the adapter alone
(adapter_file.py).
"""

import hashlib
import io
import os
import warnings

import torch

import lora
from support import distributed, seeds
from support.form import Maybe, count, finite, misfit
from support.hf_folder import why_not_loaded
from support.run_folder import write_atomic

# ------------------------------------------------------------------------------------------ content


def tensor(shape=None, dtype=None):
    """A form (support/form.py): a tensor of finite floats, of this shape and dtype."""

    def fits(value):
        return (
            torch.is_tensor(value)
            and value.is_floating_point()
            and (shape is None or ((*value.shape,) == (*shape,) and value.dtype == dtype))
            and bool(value.isfinite().all())
        )

    fits.__name__ = "finite numbers" + (f" {(*shape,)} of {dtype}" if dtype else "")
    return fits


SETTINGS = ("params", "betas", "eps", "weight_decay", "lr_ratio")  # of a group, in every torch


def groups_like(groups):
    """A form: an optimizer's groups with these parameters and settings; lr is set at each step.

    A setting that this torch has beside SETTINGS, and the checkpoint's had not, is not compared.
    """

    def groups_of_the_flags(value):
        return len(value) == len(groups) and all(
            found.get(key) == wanted
            for found, group in zip(value, groups, strict=True)
            for key, wanted in group.items()
            if key != "lr" and (key in found or key in SETTINGS)
        )

    return groups_of_the_flags


def generator_state(value):
    """A form: what a torch.Generator of the CPU can be set to."""
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def random_bytes(value):
    """A form: what a torch.Generator of another device might be set to."""
    return torch.is_tensor(value) and value.dtype == torch.uint8 and value.dim() == 1


def form_like(value):
    """A form: what has the keys, shapes and dtypes of a value (a state before the first step)."""
    if isinstance(value, dict):
        return {key: form_like(v) for key, v in value.items()}
    if not torch.is_tensor(value):
        return count if type(value) is int else type(value)
    return generator_state if value.dtype == torch.uint8 else tensor(value.shape, value.dtype)


ANY = tensor()
DECISION = {"step": count, "epoch": count, "scores": dict, "on": dict}
FORM = {  # of every checkpoint
    "parameters": {str: ANY},
    "optimizer": {
        "state": {int: dict},
        "param_groups": [dict],
    },
    "on": {str: bool},
    "ranks_off": {str: [count]},
    "plan": Maybe({"history": [DECISION], "rng": generator_state}),
    "delta": Maybe(
        {
            "t": count,
            "begin": {str: (ANY, ANY)},
            "ended": {str: [(ANY, ANY, int)]},
            "weights": {str: ANY},
        }
    ),
    "allocator": Maybe(dict),
    "position": {"epoch": count, "step_in_epoch": count, "step": count},
    "metrics": {
        "best": Maybe({str: finite}),
        "last": Maybe({str: finite}),
        "seconds": finite,
        "score_seconds": finite,
    },
    "generators": [{"cpu": generator_state, "cuda": Maybe(random_bytes)}],
    "log_lines": count,
}


def finite_state(value):
    """A form: what an optimizer other than AdamW keeps of a parameter; its keys are its own."""
    return type(value) is dict and all(ANY(v) or finite(v) for v in value.values())


def form_of(state, like):
    """The form of a checkpoint that fits one run: the names, shapes and dtypes of that run.

    Args:
        state: of the form FORM; what may be absent (moments, stretches) is looked for in it.
        like: what `expected` gives of the run before its first step.
    """
    parts = any(torch.is_tensor(p) for p in like["stepped"])  # the factors keep their shape then
    kept = {}  # of single ranks: how many rank-one parts each module has
    for decision in state["plan"]["history"] if state["plan"] and not parts else []:
        kept |= {n: len(on) for n, on in decision["on"].items() if type(on) is list and on}
    shapes = {}
    for name, p in like["parameters"].items():
        module, _, key = name.rpartition(".")
        r = kept.get(module) if key in ("lora_A", "lora_B") else None
        shape = p.shape if r is None else (r, p.shape[1]) if key == "lora_A" else (p.shape[0], r)
        shapes[name] = tensor(shape, p.dtype)
    step, seen = tensor((), torch.float32), state["optimizer"]["state"]
    stepped = [shapes[p] if type(p) is str else tensor(p.shape, p.dtype) for p in like["stepped"]]
    moments = [{"step": step, "exp_avg": s, "exp_avg_sq": s} for s in stepped]
    moments = moments if like["adamw"] else [finite_state] * len(stepped)
    own = like["optimizer"]["state"]  # what an optimizer has from the start keeps its form
    moments = [form_like(own[i]) if i in own else form for i, form in enumerate(moments)]
    form = FORM | {
        "parameters": shapes,
        "optimizer": {
            "state": {i: form for i, form in enumerate(moments) if i in seen},
            "param_groups": groups_like(like["optimizer"]["param_groups"]),
        },
        "on": dict.fromkeys(like["on"], bool),
        "ranks_off": {name: [count] for name in like["on"]},
        "plan": like["plan"] and FORM["plan"].form,
        "delta": like["delta"] and FORM["delta"].form,
        "allocator": form_like(like["allocator"]) if like["allocator"] else None,
    }
    if like["delta"] and state["delta"]:
        ended, weights = like["delta"]["ended"], like["delta"]["weights"]
        pair = {n: (shapes[f"{n}.lora_A"], shapes[f"{n}.lora_B"]) for n in ended}
        begun = {n: pair[n] for n in ended if n in state["delta"]["begin"]}
        form["delta"] = {
            "t": count,
            "begin": begun,
            "ended": {n: [(*pair[n], int)] for n in ended},
            "weights": {n: tensor(w.shape, w.dtype) for n, w in weights.items()},
        }
    return form


def capture(model, optimizer, plan, delta, allocator=None):
    """The part of a checkpoint that is about weights and decisions; what a run lacks is None."""
    return {
        "parameters": {name: p.detach() for name, p in lora.trainable(model).items()},
        "optimizer": optimizer.state_dict(),
        "on": {name: layer.enabled for name, layer in lora.adapters(model).items()},
        "ranks_off": {name: layer.ranks_off for name, layer in lora.adapters(model).items()},
        "plan": plan.state() if plan else None,
        "delta": delta.state() if delta else None,
        "allocator": allocator.state() if allocator else None,
    }


def expected(model, optimizer, plan, delta, allocator=None):
    """What a checkpoint has to be like to fit a run that was set up: for form_of."""
    names = {id(p): name for name, p in lora.trainable(model).items()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **capture(model, optimizer, plan, delta, allocator),
        "adamw": type(optimizer) is torch.optim.AdamW,
        # a name of trainable, or the tensor itself: single ranks that go on and off
        "stepped": [names.get(id(p), p.detach()) for p in stepped],
    }


def random_state(device):
    """Where dropout's generators stand, on the CPU and on the device."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore(state, model, optimizer, plan, delta, device, seed, allocator=None):
    """Put back what capture and random_state took; plan, delta and allocator may be None.

    A process that was not there when the checkpoint was written gets dropout's generators from
    (seed, step, rank).

    Returns:
        str: what another number of processes means for the run, "" where it is the same number.

    Raises:
        ValueError: the checkpoint belongs to other flags.
    """
    parameters = lora.trainable(model)
    if set(parameters) != set(state["parameters"]):
        raise ValueError("the checkpoint belongs to other flags than config.json")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    lora.switch(model, {name for name, on in state["on"].items() if on})
    for name, layer in lora.adapters(model).items():
        layer.ranks_off = state["ranks_off"][name]
    if plan:
        plan.load(state["plan"])
    if delta:
        delta.load(state["delta"])
    if allocator:
        allocator.load(state["allocator"])
    optimizer.load_state_dict(state["optimizer"])
    before, now, rank = len(state["generators"]), distributed.world(), distributed.rank()
    if rank < before:
        torch.set_rng_state(state["generators"][rank]["cpu"])
        if device.type == "cuda" and state["generators"][rank]["cuda"] is not None:
            torch.cuda.set_rng_state(state["generators"][rank]["cuda"], device)
    else:
        name = f"dropout/{state['position']['step']}/{rank}"
        torch.manual_seed(seeds.generator(seed, name).initial_seed())
    if now == before:
        return ""
    return (
        f"{before} process{'es' * (before > 1)} began, {now} go{'es' * (now == 1)} on: the same "
        "run up to rounding, and with other dropout masks if there are any"
    )


# --------------------------------------------------------------------------------------------- file


def write(folder, state):
    """A dict of tensors, numbers and containers of them -> checkpoint.pt; the old one is kept."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    new, path = folder / "checkpoint.new.pt", folder / "checkpoint.pt"
    write_atomic(new, content + hashlib.sha256(content).digest())
    if path.exists():
        os.replace(path, folder / "checkpoint.previous.pt")
    os.replace(new, path)


def read(path):
    """The dict in one checkpoint file.

    Raises:
        ValueError: damaged, of another form than FORM, or a pickle with code.
        FileNotFoundError: not there.
    """
    content = path.read_bytes()
    body, digest = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, of formats that it refuses
            state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: zip, pickle, EOF, runtime
        raise ValueError(f"{path} {why_not_loaded(error)}") from error
    wrong = misfit(state, FORM)
    if wrong:
        raise ValueError(f"{path} is no checkpoint of a run: {wrong}")
    return state


def read_last(folder, like=None):
    """The last checkpoint that is whole, and fits.

    Args:
        folder: pathlib.Path of the run.
        like: what it has to fit, `expected` of the run before its first step; None = anything.

    Returns:
        (state, note): state is None where the run stopped before its first checkpoint; note says
        what was damaged, "" if nothing was.

    Raises:
        ValueError: there are checkpoints, and none of them is whole.
    """
    problems = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        try:
            state = read(folder / name)
            wrong = misfit(state, form_of(state, like)) if like else ""
            if wrong:
                raise ValueError(f"{folder / name} does not fit the run: {wrong}")
        except FileNotFoundError:
            continue
        except ValueError as error:
            problems.append(str(error))
        else:
            at = state["position"]["step"]
            note = f"{'; '.join(problems)}; going on from {name}, step {at}" if problems else ""
            return state, note
    if problems:
        raise ValueError("; ".join(problems))
    return None, ""
