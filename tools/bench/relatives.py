"""What each relative costs beside plain LoRA, at one budget: bench relatives.

    time     seconds of a training step / seconds of plain LoRA's, on the same batches, in turn
    memory   peak above the loaded model / plain LoRA's peak, in a fresh process each

The settings are the arms of studies/relatives.toml, MiniLM on the embedded task. A step is
train.train_step: forward, backward, the optimizer's rule and the allocator's. ALoRA moves ranks
after the first epoch, which is not reached here.

What this file does not do: measure accuracy (tools/compare.py, with the same study).
"""

import ctypes
import functools
import gc

import lora
import train
from support import flags
from tools import compare
from tools.bench import peak, pictures, timing

STUDY = compare.ROOT / "studies" / "relatives.toml"
STEPS = 5
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def settings():
    """{arm: command line of train.py}, plain LoRA first."""
    study = compare.read_study(STUDY)
    task = f"--task {study.task} --device cpu"
    return {arm.name: f"{compare.flags_of(study, arm)} {task}" for arm in study.arms}


def steps(command):
    """(functions that take a training step each, trainable adapter parameters) of a run."""
    run = train.set_up(flags.parse_flags(command.split()))
    run.model.train()
    counts = lora.count_trainable(run.model)
    groups = train.epoch_steps(run, 0)[:STEPS]
    functions = [functools.partial(train.train_step, run, group, run.args.lr) for group in groups]
    return functions, sum(counts[name] for name in lora.adapters(run.model))


def step_peak(command, first):
    """Peak MiB of STEPS training steps above the loaded model, for peak.in_fresh_process.

    Every tensor of 64 KiB or more has memory of its own, which goes back to the system with it: in
    a heap that is used again, gaps of chance are larger than what methods differ by. Before the
    model is loaded, steps of the command `first` are taken, since the libraries keep buffers from
    their first calls.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    for step in steps(first)[0]:
        step()
    functions, _ = steps(command)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return peak.peak_above(lambda: [step() for step in functions])


def beside_first(commands, rounds):
    """Each setting beside the first.

    Args:
        commands: dict name -> command line of train.py. rounds: int, counted rounds.

    Returns:
        dict name -> (parameters, time as a (ratio, smallest, largest), memory as a ratio).
    """
    (first, command), *others = commands.items()
    base, parameters = steps(command)
    base_peak = peak.in_fresh_process(step_peak, command=command, first=command)
    found, of_first = {}, command
    for name, command in others:
        functions, count = steps(command)
        seconds = timing.interleaved({first: base, name: functions}, rounds)
        time = timing.ratio(seconds[name], seconds[first])
        memory = peak.in_fresh_process(step_peak, command=command, first=of_first)
        found[name] = count, time, memory / base_peak
    return {first: (parameters, (1.0, 1.0, 1.0), 1.0)} | found


def relatives(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    found = beside_first(settings(), rounds)
    lines = ["| method | adapter parameters | time × | memory × |", "|---|---|---|---|"]
    for name, (count, time, memory) in found.items():
        lines.append(f"| {name} | {count:,} | {timing.show(time)} | {memory:.2f} |")
    lines += [
        "",
        f"MiniLM on q, k, v, the embedded task, batch 16, {STEPS} steps a round, each method in "
        "turn with plain LoRA; memory: one fresh process each",
        timing.conditions(rounds),
    ]
    pictures.bars(picture, {n: t for n, (_, t, _) in found.items()}, "time of a step, LoRA = 1", 1)
    return lines
