"""checkpoint.pt: everything that a resumed run needs to end with the same bits.

    checkpoint.pt            the state; its last 32 bytes are the SHA-256 of the rest
    checkpoint.previous.pt   the one before it, for when that one is damaged

    key             | content
    parameters      | every lora_A and lora_B, on or off, and the head
    optimizer       | AdamW's moments and step counts
    on              | which modules are on
    plan            | decisions so far, and the generator of the ties
    delta           | Delta-LoRA: t, the stretches, and the moved weights themselves
    position        | epoch, step_in_epoch, step
    metrics         | last, best, seconds
    generators      | where dropout's generators stand, of every process
    log_lines       | how many lines of metrics.jsonl were written before

Code in the file is never executed (weights_only).

What this file does not do: the frozen weights (they are reloaded), the adapter alone
(adapter_file.py).
"""

import hashlib
import io
import os
import pickle

import torch

import lora
from support import distributed, seeds
from support.run_folder import write_atomic

# ------------------------------------------------------------------------------------------ content


def capture(model, optimizer, plan, delta):
    """The part of a checkpoint that is about weights and decisions; plan and delta may be None."""
    return {
        "parameters": {name: p.detach() for name, p in lora.trainable(model).items()},
        "optimizer": optimizer.state_dict(),
        "on": {name: layer.enabled for name, layer in lora.adapters(model).items()},
        "plan": plan.state() if plan else None,
        "delta": delta.state() if delta else None,
    }


def random_state(device):
    """Where dropout's generators stand, on the CPU and on the device."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore(state, model, optimizer, plan, delta, device, seed):
    """Put back what capture and random_state took; plan and delta may be None.

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
    if plan:
        plan.load(state["plan"])
    if delta:
        delta.load(state["delta"])
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
        ValueError: damaged. FileNotFoundError: not there.
    """
    content = path.read_bytes()
    body, digest = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def read_last(folder):
    """The last checkpoint that is whole.

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
