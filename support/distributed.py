"""Several processes that behave like one (torchrun, data parallel).

    rank    which process, 0 … world - 1        world    how many; 1 without torchrun

Every process holds the whole model and takes the same steps on its share of each batch. What is
exchanged is sums: of the gradients of what trains, once a step; of the gradients and counts that
scores are made of; and predictions. The sums have the same bits on every process.

All processes call the model equally often, and the same way: where its base is sharded
(support/large.py), each call is an exchange. Whoever has less to do than another repeats an item,
with weight 0, while it would only have waited.

    what                 | travels by
    objects, messages    | gloo, out of the CPU's memory, whatever the model is on
    tensors on the CPU   | gloo
    tensors on a GPU     | NCCL; the group is made when the first of them is to be summed

The first process alone speaks and writes, and its exit code is the run's. With one process every
function here returns what it is given.

What this file does not do: shard a model (support/large.py) or an optimizer, start processes
(torchrun does).
"""

import contextlib
import functools
import os

import torch
import torch.distributed as dist

from support.errors import one_line, shown

_parent = None  # process id of torchrun

# ------------------------------------------------------------------------------------------ set-up


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def start():
    """Join the processes that torchrun started, if it did. Nothing is put on a GPU here.

    Raises:
        ValueError: WORLD_SIZE is set, but not the rest of what torchrun sets.
        ConnectionError: the processes do not find each other.
    """
    global _parent
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group("gloo")
        except RuntimeError as error:  # the port is in use, nobody answers
            raise ConnectionError(f"the processes do not meet: {one_line(error)}") from error
        _parent = os.getppid()


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
        group.cache_clear()


def orphaned():
    """torchrun was killed: nobody is left who could stop this process with the others."""
    return world() > 1 and os.getppid() != _parent


def command():
    """What starts as many processes again: the words before train.py.

    Of processes on several machines only torchrun's user knows how; one can go on with their run.
    """
    if world() == 1 or world() != int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return "python"
    return f"torchrun --standalone --nproc-per-node {world()} --"


def pick_device(name):
    """--device as a torch.device, made the current one; auto: CUDA if there is one, else the CPU.

    Under torchrun cuda is a GPU for each process: number LOCAL_RANK of its machine.

    Raises:
        ValueError: there is no such device, or not one for each process.
    """
    many = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and many > 1:
        if name != "cuda":
            raise ValueError(f"--device {name} is one GPU for {many} processes: give --device cuda")
        if many > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {many} processes here, and this machine has "
                f"{torch.cuda.device_count()} GPUs: start as many, or give --device cpu"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # before anything is put on it
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it has shapes and no numbers")
    except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
        # The last three: this build of torch is without it.
        raise ValueError(
            f"--device {shown(name)} cannot be used: {one_line(error, 150)}; try cpu"
        ) from error
    return device


# ---------------------------------------------------------------------------------------- exchange


@functools.cache
def group(device_type):
    """The processes that exchange tensors of a kind of device; None is the first group, gloo."""
    return dist.new_group(backend="nccl") if device_type == "cuda" else None


def exchange(collective, *args, **options):
    """Call a collective. Raises ConnectionError where another process is gone."""
    try:
        collective(*args, **options)
    except RuntimeError as error:
        raise ConnectionError("another process has ended") from error


def share(items):
    """This process's part of a list: every world-th item, so that shares are alike in length."""
    return items[rank() :: world()]


def even(items):
    """share(items), as long on every process: where it lacks one, the first item stands in."""
    mine = share(items)
    return mine if len(mine) * world() >= len(items) else [*mine, items[0]]


def shares(items):
    """Yields (item, weight) of this process's share, equally many on every process.

    The weight is 1, and 0 for an item that another process has as well.
    """
    mine = share(items)
    for item in mine:
        yield item, 1
    if len(mine) * world() < len(items):
        yield items[0], 0


def part(indices):
    """(share(indices), 1); where that is empty, (the first index, 0)."""
    mine = share(indices)
    return (mine, 1) if mine else (indices[:1], 0)


def sum_tensors(tensors):
    """Their sums over processes, in one exchange.

    Args:
        tensors: list of tensors of one dtype and device, of the same shapes on every process.
    """
    if world() == 1:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])  # (all numbers,)
    exchange(dist.all_reduce, flat, group=group(flat.device.type))
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def sum_numbers(numbers):
    """The sums over processes of floats, or of lists of them, in float64."""
    if world() == 1:
        return numbers
    flat = torch.tensor(numbers, dtype=torch.float64)
    exchange(dist.all_reduce, flat)
    return flat.tolist()


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
    *sums, extra = sum_tensors([*grads, grads[0].new_tensor(numbers)])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient
    return extra.tolist()


def mean_scores(scores):
    """{name: float, or list of floats}: the mean over processes.

    The processes have scored the same sums, and yet rounding on one machine could make them
    disagree about what is on.
    """
    if world() == 1:
        return scores
    sums = sum_numbers(list(scores.values()))
    means = torch.tensor(sums, dtype=torch.float64) / world()  # (modules,) or (modules, r)
    return dict(zip(scores, means.tolist(), strict=True))


def gather(value):
    """[value of rank 0, of rank 1, …], of anything that can be pickled, on every process."""
    if world() == 1:
        return [value]
    values = [None] * world()
    exchange(dist.all_gather_object, values, value)
    return values


@contextlib.contextmanager
def together():
    """What one process cannot do, none does: a ValueError or OSError of one is raised by all."""
    own = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    for process, message in enumerate(gather(str(own) if own else None)):
        if message is not None:
            raise own or ValueError(f"process {process}: {message}")
