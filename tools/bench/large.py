"""A base in 16 bits, and one that is spread over processes: bench base, bench shard.

MODEL is trained on random tokens, BATCH rows of TOKENS, r 8 on query and value. Memory is the peak
of a process above what it was before it loaded the model: weights, activations, gradients, moments.
Each is measured in a process of its own.

What this file does not do: measure a GPU, or what a run scores (tests/test_large.py: it computes
the same up to rounding).
"""

import json
import os
import statistics
import subprocess
import sys
import time

import torch

import lora
from model import load_pretrained
from support import distributed, large
from tools.bench import peak, pictures, timing

MODEL = "smollm2-q4"
BATCH, TOKENS, STEPS = 4, 128, 3
WHOLE, SHARDED = "whole in each process", "sharded by block"
# glibc keeps what is freed between two tensors that stay, as long as it is small: not above this.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def prepared(base_dtype):
    """(model with adapters, batch)."""
    model, _ = load_pretrained(MODEL, head="lm", base_dtype=base_dtype)
    lora.inject(model, r=8)
    lora.mark_trainable(model)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (BATCH, TOKENS), generator=rng)  # (b, t)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def stepper(model, batch):
    """A function that takes one optimizer step."""
    parameters = list(lora.trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        model(**batch).loss.backward()
        distributed.sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reset_peak():
    """The peak of this process starts anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measured(base_dtype, sharded=False):
    """Of this process: MiB of parameters, at the peak of loading and of a step; seconds a step."""
    before = peak.status("VmRSS")
    reset_peak()
    model, batch = prepared(base_dtype)
    large.place(model, torch.device("cpu"), sharded)
    loading = peak.status("VmHWM") - before
    step, seconds = stepper(model, batch), []
    reset_peak()
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    highest = peak.status("VmHWM") - before
    held = large.bytes_of_parameters(model)[0] / 2**20
    return held, loading, highest, statistics.median(seconds)


def step_peak(base_dtype):
    """MiB at the peak of a step, model included, for peak.in_fresh_process."""
    return measured(base_dtype)[2]


def base(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    found = {dtype: prepared(dtype) for dtype in large.DTYPES}
    arms = {dtype: [stepper(*pair)] * STEPS for dtype, pair in found.items()}
    seconds = timing.interleaved(arms, rounds)
    lines = ["| base | tokens/s | speed | MiB of weights | MiB at the peak of a step |"]
    lines.append("|---|---|---|---|---|")
    shown = {dtype: timing.ratio(seconds["fp32"], seconds[dtype]) for dtype in arms}
    for dtype, (whole, _) in found.items():
        rate = BATCH * TOKENS * STEPS / statistics.median(seconds[dtype])
        peaks = [peak.in_fresh_process(step_peak, base_dtype=dtype) for _ in range(3)]
        held = large.bytes_of_parameters(whole)[0] / 2**20
        speed = timing.show(shown[dtype])
        lines.append(
            f"| {dtype} | {rate:.0f} | {speed} | {held:.0f} | {statistics.median(peaks):.0f} |"
        )
    lines += ["", f"{MODEL}, {BATCH} rows of {TOKENS} tokens, {STEPS} steps a round, r 8 on q, v"]
    lines.append(timing.conditions(rounds, dtype="float32 and bfloat16"))
    pictures.bars(picture, shown, "speed, float32 = 1", 1.0)
    return lines


def of_two_processes(sharded):
    """[measured() in process 0, in process 1] under torchrun."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    call = ("-m", "tools.bench.large", "yes" if sharded else "no")
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *call],
        env={**os.environ, **HEAP, "PYTHONPATH": str(peak.ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"two processes: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shard(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    lines = [
        "| base | MiB of weights | at the peak of loading | at the peak of a step | s a step |"
    ]
    lines.append("|---|---|---|---|---|")
    shown = {}
    for kind in (WHOLE, SHARDED):
        found = [r for _ in range(rounds) for r in of_two_processes(kind == SHARDED)]
        *columns, seconds = map(timing.spread, zip(*found, strict=True))
        shown[kind] = columns[-1]
        cells = (timing.show(three, 0) for three in columns)
        lines.append(f"| {kind} | {' | '.join(cells)} | {timing.show(seconds)} |")
    lines += ["", f"a process of two on gloo; {MODEL}, {BATCH} rows of {TOKENS} tokens each"]
    lines.append(timing.conditions(rounds, how="", threads=1))
    pictures.bars(picture, shown, "MiB of a process at the peak of a step")
    return lines


def main(sharded):
    """One of the processes; the first prints what all have measured."""
    torch.set_num_threads(1)
    distributed.start()
    found = distributed.gather(measured("fp32", sharded == "yes"))
    if distributed.rank() == 0:
        print(json.dumps(found), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
