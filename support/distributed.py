"""Several processes that train one model on their shares of each batch (torchrun, data parallel).

    rank    which process, 0 … world - 1        world    how many; 1 without torchrun

Every process holds the whole model and takes the same steps: the gradients of what trains are
summed over the processes, and nothing else of the model is exchanged. Scores are averaged before
anyone decides, so that rounding on one machine cannot make the processes disagree about what is on.
With one process every function here returns what it is given.

What this file does not do: shard a model or an optimizer, start processes (torchrun does).
"""

import os

import torch
import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(name):
    """--device as a torch.device; auto: CUDA if there is one, under torchrun one per process.

    Raises:
        ValueError: there is no such device.
    """
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


def start(device="auto"):
    """Join the processes that torchrun started, if it did: gloo on the CPU, NCCL on CUDA."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    cuda = pick_device(device).type == "cuda"
    if cuda:  # before anything else is put on a device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def share(items):
    """This process's part of a list: every world-th item, so that shares are alike in length."""
    return items[rank() :: world()]


def sum_gradients(parameters, *numbers):
    """Replace .grad by the sum over processes, in one exchange; None counts as zero.

    Args:
        parameters: list of parameters, the same on every process: those of what is on, and the
            head.
        numbers: floats to be summed along.

    Returns:
        list of the sums of the numbers.
    """
    if world() == 1:
        return list(numbers)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    extra = grads[0].new_tensor(numbers)
    flat = torch.cat([g.flatten() for g in [*grads, extra]])  # (all numbers,)
    dist.all_reduce(flat)
    *parts, extra = flat.split([*(p.numel() for p in parameters), len(numbers)])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return extra.tolist()


def mean_scores(scores):
    """{name: float, or list of floats}: the mean over processes, the same bits on each of them."""
    if world() == 1:
        return scores
    cuda = dist.get_backend() == "nccl"
    flat = torch.tensor(list(scores.values()), dtype=torch.float64)  # (modules,) or (modules, r)
    flat = flat.to("cuda" if cuda else "cpu")
    dist.all_reduce(flat)
    return dict(zip(scores, (flat / world()).tolist(), strict=True))


def gather(value):
    """[value of rank 0, of rank 1, …], of anything that can be pickled, on every process."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values
