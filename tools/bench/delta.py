"""What Delta-LoRA costs beside LoRA, in time per optimizer step and in memory: bench delta.

    share           seconds in before_step() and after_step() / seconds of the rest of the step
    physical limit  every adapted weight read once and written once
    extra peak      peak memory with Delta-LoRA - peak memory without it

What this file does not do: measure accuracy (tools/compare.py).
"""

import statistics
import time

import torch

import lora
from delta_lora import DeltaLoRA
from model import Config, Transformer
from support.families import FAMILIES
from tools.bench import peak, pictures, timing

ADAPTED = {"q,v": ("q_proj", "v_proj"), "all six": lora.LINEARS}
BLOCKS, STEPS = 2, 3


def opt_350m(targets):
    """BLOCKS blocks of OPT-350M's shape (d 1024, FFN 4096, post-LN), with LoRA r 8."""
    config = Config(
        family="opt",
        **FAMILIES["opt"].features,
        vocab_size=1000,
        hidden_size=1024,
        num_layers=BLOCKS,
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
    """b examples of t tokens, without padding."""
    ids = torch.randint(5, 1000, (b, t), generator=torch.Generator().manual_seed(0))  # (b, t)
    labels = torch.arange(b) % 2  # (b,)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def steps(model, delta):
    """(seconds of a training step without delta, seconds in delta), medians over STEPS steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    data, whole, extra = batch(), [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(**data).loss.backward()
        before = time.perf_counter()
        if delta:
            delta.before_step()
        copied = time.perf_counter()
        optimizer.step()
        stepped = time.perf_counter()
        if delta:
            delta.after_step()
        end = time.perf_counter()
        optimizer.zero_grad()
        extra.append((copied - before) + (end - stepped))
        whole.append(end - start - extra[-1])
    return statistics.median(whole), statistics.median(extra)


def read_and_write(model):
    """Seconds of the physical limit."""
    weights = [layer.base.weight for layer in lora.adapters(model).values()]
    start = time.perf_counter()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.0)
    return time.perf_counter() - start


def delta_peak(adapted, with_delta):
    """Peak MiB of STEPS steps above the loaded model, for peak.in_fresh_process."""
    model = opt_350m(ADAPTED[adapted])
    delta = DeltaLoRA(model, 2.0, -1) if with_delta else None
    return peak.peak_above(lambda: steps(model, delta))


def extra_peak(adapted):
    """MiB that Delta-LoRA needs above LoRA: medians of three fresh processes each."""
    with_delta, without = (
        statistics.median(
            peak.in_fresh_process(delta_peak, adapted=adapted, with_delta=on) for _ in range(3)
        )
        for on in (True, False)
    )
    return with_delta - without


def delta(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    models = {a: opt_350m(targets) for a, targets in ADAPTED.items()}
    deltas = {a: DeltaLoRA(m, 2.0, -1) for a, m in models.items()}
    shares, limits = {a: [] for a in ADAPTED}, {a: [] for a in ADAPTED}
    for i in range(rounds + 1):
        for adapted, model in models.items():
            whole, extra = steps(model, deltas[adapted])
            limit = read_and_write(model)
            if i:  # round 0 warms up
                shares[adapted].append(extra / whole)
                limits[adapted].append(extra / limit)
    lines = [
        "| adapted | % of a training step | against one read and one write of W | extra peak MiB |",
        "|---|---|---|---|",
    ]
    for adapted, model in models.items():
        share = timing.show([100 * s for s in timing.spread(shares[adapted])], 1)
        weights = sum(a.base.weight.numel() for a in lora.adapters(model).values())
        lines.append(
            f"| {adapted} | {share} | {statistics.median(limits[adapted]):.1f} | "
            f"{extra_peak(adapted):.0f} (W: {weights * 4 / 2**20:.0f}) |"
        )
    lines += [
        "",
        f"OPT-350M-shaped, {BLOCKS} blocks, batch 16, 128 tokens, r 8, {STEPS} steps a round",
        timing.conditions(rounds),
    ]
    shown = {adapted: timing.spread(values) for adapted, values in shares.items()}
    pictures.bars(picture, shown, "share of a training step")
    return lines
