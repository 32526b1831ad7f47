"""What Delta-LoRA costs beside LoRA, time per optimizer step and memory: the "delta" benchmark.

What this file does not do: measure accuracy (tools/compare.py).
"""

import statistics
import time

import torch

import lora
from delta_lora import DeltaLoRA
from model import Config, Transformer
from support.families import FAMILIES
from tools.bench import timing

PLACES = {"q,v": ("q_proj", "v_proj"), "all six": lora.LINEARS}
LAYERS = 2


def opt_350m(layers, targets):
    """An OPT-350M-shaped model (d 1024, FFN 4096, post-LN) of a few layers, with LoRA r 8."""
    config = Config(
        family="opt",
        **FAMILIES["opt"].features,
        vocab_size=1000,
        hidden_size=1024,
        num_layers=layers,
        num_heads=16,
        ffn_dim=4096,
        max_positions=128,
        embed_dim=512,
        pad_token_id=1,
        activation="relu",
        pre_ln=False,
        final_norm=False,
    )
    torch.manual_seed(0)
    model = Transformer(config)
    lora.inject(model, targets, r=8, lora_alpha=16)
    lora.mark_trainable(model)
    return model


def batch(b=16, t=128):
    ids = torch.randint(5, 1000, (b, t), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(b) % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def steps(model, delta, count):
    """(seconds of a training step without delta, seconds in delta), medians over count steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    data, whole, extra = batch(), [], []
    for _ in range(count):
        start = time.perf_counter()
        model(**data).loss.backward()
        before = time.perf_counter()
        if delta:
            delta.before_step()
        a = time.perf_counter()
        optimizer.step()
        b = time.perf_counter()
        if delta:
            delta.after_step()
        after = time.perf_counter()
        optimizer.zero_grad()
        spent = (a - before) + (after - b)
        extra.append(spent)
        whole.append(after - start - spent)
    return statistics.median(whole), statistics.median(extra)


def read_and_write(model):
    """Seconds of the physical limit: every adapted weight read and written once."""
    weights = [layer.base.weight for layer in lora.adapters(model).values()]
    start = time.perf_counter()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.0)
    return time.perf_counter() - start


def delta_peak(places, with_delta):
    """Peak MiB of three steps above the loaded model, for in_fresh_process."""
    model = opt_350m(LAYERS, PLACES[places])
    delta = DeltaLoRA(model, 2.0, -1) if with_delta else None
    return timing.peak_above(lambda: steps(model, delta, 3))


def delta(rounds, out):
    """Lines of the "delta" table; the picture goes to out."""
    models = {p: opt_350m(LAYERS, targets) for p, targets in PLACES.items()}
    deltas = {p: DeltaLoRA(m, 2.0, -1) for p, m in models.items()}
    shares, limits = {p: [] for p in PLACES}, {p: [] for p in PLACES}
    for i in range(rounds + 1):
        for p, model in models.items():
            whole, extra = steps(model, deltas[p], 3)
            limit = read_and_write(model)
            if i:  # round 0 warms up
                shares[p].append(extra / whole)
                limits[p].append(extra / limit)
    lines = [
        "| adapted | share of a training step | against one read and one write of W "
        "| extra peak MiB |",
        "|---|---|---|---|",
    ]
    for p in PLACES:
        share, limit = statistics.median(shares[p]), statistics.median(limits[p])
        with_, without = (
            [timing.in_fresh_process("bench_delta", f"delta_peak({p!r}, {on})") for _ in range(3)]
            for on in (True, False)
        )
        extra = statistics.median(with_) - statistics.median(without)
        weight = sum(a.base.weight.numel() for a in lora.adapters(models[p]).values()) / 2**18
        lines.append(
            f"| {p} | {share:.1%} ({min(shares[p]):.1%} … {max(shares[p]):.1%}) | {limit:.1f} | "
            f"{extra:.0f} (W: {weight:.0f}) |"
        )
    lines += ["", f"OPT-350M-shaped, {LAYERS} layers, batch 16, 128 tokens, r 8, 3 steps a round"]
    lines.append(timing.conditions(rounds))
    picture = {p: (statistics.median(s), min(s), max(s)) for p, s in shares.items()}
    timing.bars(out / "bench-delta.png", picture, "share of a training step")
    return lines
