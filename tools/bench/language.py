"""A language model beside transformers: bench train and memory with --model smollm2-q4; generate.

Training as in training.py, on data/describe: the meaning representation is the prompt, and the loss
is of the sentence alone. Equal math: the same weights, A, batches and optimizer, and no dropout.
transformers computes logits and their loss at every position, model.py where a token is predicted.
Tokens are counted without padding, those of the prompts too; of generated text, the new ones.

What this file does not do: measure how good the texts are.
"""

import json
import statistics
from pathlib import Path

import torch

import lora
from model import load_pretrained
from support import download, glue, hf_folder, seeds
from tools.bench import peak, pictures, timing
from tools.bench.training import OURS, PEER, adapted, memory_table, peft_model, training

DATA = Path(__file__).parents[2] / "data" / "describe"
NAME = "smollm2-q4"
BATCH, STEPS = 8, 4
PROMPTS, NEW_TOKENS = (1, 8), 32  # prompts at once; tokens for each


# ------------------------------------------------------------------------------------------ batches


def records(split, count):
    """The first records of data/describe: [(prompt, sentence)]."""
    lines = (DATA / f"{split}.jsonl").read_text().splitlines()[:count]
    return [(r["mr"] + "\n", r["references"][0]) for r in map(json.loads, lines)]


def padded(rows, value, left=False):
    """Lists of unequal length -> (b, t)."""
    t = max(map(len, rows))
    fill = [[value] * (t - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.tensor([f + row if left else row + f for f, row in pairs])


def describe_batches(model, tokenizer):
    """STEPS batches of the same texts: (grouped by length, at random)."""
    examples, end = [], model.config.eos_token_ids[0]
    for prompt, sentence in records("train", BATCH * STEPS):
        before, after = tokenizer.encode(prompt).ids, [*tokenizer.encode(sentence).ids, end]
        labels = [-100] * len(before) + after
        examples.append({"input_ids": before + after, "labels": labels})
    rng = seeds.generator(0, "bench")
    grouped = glue.grouped_by_length(examples, BATCH, rng)
    order = torch.randperm(len(examples), generator=rng).tolist()
    mixed = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

    def batch_of(indices):
        rows = [examples[i] for i in indices]
        return {
            "input_ids": padded([e["input_ids"] for e in rows], model.config.pad_token_id),
            "attention_mask": padded([[1] * len(e["input_ids"]) for e in rows], 0),
            "labels": padded([e["labels"] for e in rows], -100),
        }

    return tuple([batch_of(indices) for indices in batches] for batches in (grouped, mixed))


# ----------------------------------------------------------------------------------------- training


def stock():
    """transformers' own model of the same weights, in eval mode."""
    import transformers

    folder = download.model_folder(NAME)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peer_of(ours):
    """transformers' model with PEFT, given our A."""
    peer = peft_model(stock(), "llama", "CAUSAL_LM")
    parameters = dict(peer.named_parameters())
    with torch.no_grad():
        for name, layer in lora.adapters(ours).items():
            path = f"base_model.model.model.{hf_folder.hf_module('llama', name)}"
            parameters[f"{path}.lora_A.default.weight"].copy_(layer.lora_A)
    return peer


def train(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    import peft
    import transformers

    base, tokenizer = load_pretrained(NAME, head="lm")
    ours = adapted(base)
    grouped, mixed = describe_batches(ours, tokenizer)
    losses = {PEER: [], OURS: []}
    arms = {
        f"{PEER}, random batches": training(peer_of(ours), mixed),
        f"{PEER}, batches by length": training(peer_of(ours), grouped, losses[PEER]),
        f"{OURS}, batches by length": training(ours, grouped, losses[OURS]),
    }
    default, equal, best = arms
    seconds = timing.interleaved(arms, rounds)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in grouped)
    predicted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in grouped)
    lines, ratios = timing.rates(seconds, default, tokens, "tokens")
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    lines += [
        "",
        f"at equal math and batches: {timing.show(timing.ratio(seconds[equal], seconds[best]))}",
        f"largest difference of a loss at equal math, {len(losses[OURS])} steps: {worst:.1e}",
        f"{tokens} tokens a round, {predicted} of them predicted, batch {BATCH}, {NAME}, r 8 on "
        "q, v; " + timing.conditions(rounds, transformers, peft),
    ]
    pictures.bars(picture, ratios, "speed, PEFT's default loop = 1", 1.0)
    return lines


def language_peak(side):
    """Peak MiB of a round of steps above the loaded model, for peak.in_fresh_process."""
    base, tokenizer = load_pretrained(NAME, head="lm")
    ours = adapted(base)
    batches = describe_batches(ours, tokenizer)[0]
    steps = training(ours if side == OURS else peer_of(ours), batches)
    return peak.peak_above(lambda: [step() for step in steps])


def memory(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    return memory_table(language_peak, rounds, picture)


# --------------------------------------------------------------------------------------- generation


def generate(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`.

    Greedy, float32, every text to its last token: none ends before.
    """
    import transformers

    ours, tokenizer = load_pretrained(NAME, head="lm")
    ours, theirs = ours.eval(), stock()
    theirs.generation_config.eos_token_id = None
    pad, arms, written = ours.config.pad_token_id, {}, {}
    for b in PROMPTS:
        rows = [tokenizer.encode(prompt).ids for prompt, _ in records("dev", b)]
        right, left = (padded(rows, pad, left) for left in (False, True))  # (b, t)
        masks = [padded([[1] * len(row) for row in rows], 0, left) for left in (False, True)]

        def write(side, b=b, right=right, left=left, masks=masks):
            if side == OURS:
                how = {"attention_mask": masks[0], "eos_token_ids": ()}
                found = ours.generate(right, NEW_TOKENS, **how)
            else:
                how = {"attention_mask": masks[1], "do_sample": False, "pad_token_id": pad}
                found = theirs.generate(left, max_new_tokens=NEW_TOKENS, **how)[:, left.shape[1] :]
            written[side, b] = found  # (b, NEW_TOKENS)

        for side in ("transformers", OURS):
            arms[side, b] = [lambda side=side, write=write: write(side)]
    seconds = timing.interleaved(arms, rounds)
    lines = ["| prompts at once | side | tokens/s | against transformers |", "|---|---|---|---|"]
    shown, equal = {}, []
    for side, b in arms:
        three = timing.ratio(seconds["transformers", b], seconds[side, b])
        rate = b * NEW_TOKENS / statistics.median(seconds[side, b])
        lines.append(f"| {b} | {side} | {rate:.1f} | {timing.show(three)} |")
        equal += [(written[side, b] == written[OURS, b]).float().mean().item()]
        if side == OURS:
            shown[f"{b} at once"] = three
    lines += ["", f"tokens that are the same: {min(equal):.1%}"]
    lines.append(f"{NAME}, {NEW_TOKENS} tokens a text; " + timing.conditions(rounds, transformers))
    pictures.bars(picture, shown, "speed, transformers = 1", 1.0)
    return lines
