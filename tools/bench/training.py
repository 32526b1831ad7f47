"""A training step beside transformers + PEFT: bench train, bench memory, bench scale.

Equal math: the same weights, A, head, batches and optimizer, and dropout 0; the losses are
compared. The floor is a loop of nothing but the matrix products that no implementation can avoid:
two for each frozen weight (forward, and the gradient of its input) over the real tokens, in the
last block at the position that the head reads, and no gradient for what lies below the first
adapter.

What this file does not do: measure accuracy (tests/peers/train_peft.py, tools/compare.py).
"""

import functools
import statistics

import torch

import lora
from model import Config, Transformer, load_pretrained
from support import download, glue, hf_folder, seeds
from support.families import FAMILIES
from tools.bench import peak, pictures, timing

BATCH, STEPS = 16, 20
PEER_TARGETS = {
    "bert": ["query", "value"],
    "opt": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
}
OURS, PEER = "ours", "transformers + PEFT"


# --------------------------------------------------------------------------------------- both sides


def adapted(model):
    """Ours: LoRA r 8 on query and value."""
    lora.inject(model, ("q_proj", "v_proj"), r=8, lora_alpha=16)
    lora.mark_trainable(model)
    return model.train()


def peft_model(peer, family, task_type="SEQ_CLS"):
    """Theirs: the same, by PEFT's own functions."""
    import peft

    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=PEER_TARGETS[family], task_type=task_type
    )
    return peft.get_peft_model(peer, config).train()


def minilm_peer(ours, dropout):
    """transformers' MiniLM with PEFT, given our A and head."""
    import transformers

    peer = transformers.AutoModelForSequenceClassification.from_pretrained(
        download.model_folder("minilm"),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    peer = peft_model(peer, "bert")
    parameters = dict(peer.named_parameters())
    with torch.no_grad():
        for name, layer in lora.adapters(ours).items():
            path = f"base_model.model.bert.{hf_folder.hf_module('bert', name)}"
            parameters[f"{path}.lora_A.default.weight"].copy_(layer.lora_A)
        for name, parameter in ours.classifier.named_parameters():
            path = "base_model.model.classifier.modules_to_save.default"
            parameters[f"{path}.{name}"].copy_(parameter)
    return peer


def training(model, batches, losses=None):
    """Functions that take one optimizer step each, on one batch each; losses: a list they fill."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    losses = [] if losses is None else losses

    def step(batch):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    return [functools.partial(step, batch) for batch in batches]


def minilm_batches(task, data_dir, tokenizer):
    """STEPS batches of the same training pairs: (grouped by length, at random)."""
    texts, _ = glue.load_task(task, data_dir)
    if glue.TASKS[task].num_labels != 2:
        raise ValueError(f"{task} has not two classes, as the head of both sides has here")
    timing.refuse_few(task, texts, BATCH * STEPS)
    examples, _ = glue.encode(texts[: BATCH * STEPS], tokenizer, 128)
    rng = seeds.generator(0, "bench")
    grouped = glue.grouped_by_length(examples, BATCH, rng)
    order = torch.randperm(len(examples), generator=rng).tolist()
    mixed = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return tuple(
        [glue.collate([examples[i] for i in indices], 0, True) for indices in batches]
        for batches in (grouped, mixed)
    )


# -------------------------------------------------------------------------------------------- train


def floor(config, batches):
    """For each batch a function that computes the matrix products of a step, and nothing else."""
    d, f, last = config.hidden_size, config.ffn_dim, config.num_layers - 1
    square, up, down = torch.randn(d, d), torch.randn(d, f), torch.randn(f, d)

    def products(b, wide, narrow):
        for layer in range(config.num_layers):
            rows = b if layer == last else len(wide)  # of q, out, fc1, fc2
            for _ in range(4 if layer else 2):  # k, v; the gradients of their inputs
                wide @ square
            for _ in range(4 if layer else 3):  # q, out; the gradients of their inputs
                wide[:rows] @ square
            for _ in range(2):  # forward, backward
                wide[:rows] @ up
                narrow[:rows] @ down

    functions = []
    for batch in batches:
        b, n = len(batch["labels"]), int(batch["attention_mask"].sum())
        functions.append(functools.partial(products, b, torch.randn(n, d), torch.randn(n, f)))
    return functions


def train(rounds, task, data_dir, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    import peft
    import transformers

    base, tokenizer = load_pretrained("minilm")
    ours = adapted(base)
    grouped, mixed = minilm_batches(task, data_dir, tokenizer)
    dropped = adapted(load_pretrained("minilm", dropout=0.1)[0])
    losses = {PEER: [], OURS: []}
    arms = {
        f"{PEER}, dropout 0.1, random batches": training(minilm_peer(ours, 0.1), mixed),
        f"{PEER}, random batches": training(minilm_peer(ours, 0.0), mixed),
        f"{PEER}, batches by length": training(minilm_peer(ours, 0.0), grouped, losses[PEER]),
        f"{OURS}, dropout 0.1, random batches": training(dropped, mixed),
        f"{OURS}, batches by length": training(ours, grouped, losses[OURS]),
        "floor: the matrix products alone": floor(ours.config, grouped),
    }
    default, _, equal, _, best, least = arms
    seconds = timing.interleaved(arms, rounds)
    pairs = BATCH * STEPS
    lines, ratios = timing.rates(seconds, default, pairs, "pairs")
    worst = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    lines += [
        "",
        f"at equal math and batches: {timing.show(timing.ratio(seconds[equal], seconds[best]))}",
        f"share of the floor: {timing.show(timing.ratio(seconds[least], seconds[best]))}",
        f"largest difference of a loss at equal math, {len(losses[OURS])} steps: {worst:.1e}",
        f"{pairs} {task} pairs a round, batch {BATCH}, MiniLM, r 8 on q, v; "
        + timing.conditions(rounds, transformers, peft),
    ]
    shown = {name: values for name, values in ratios.items() if name != least}
    pictures.bars(picture, shown, "speed, PEFT's default loop = 1", 1.0)
    return lines


# ------------------------------------------------------------------------------------------- memory


def minilm_peak(side, task, data_dir):
    """Peak MiB of two rounds of steps above the loaded model, for peak.in_fresh_process."""
    base, tokenizer = load_pretrained("minilm")
    ours = adapted(base)
    model = ours if side == OURS else minilm_peer(ours, 0.0)
    steps = training(model, minilm_batches(task, data_dir, tokenizer)[0])
    return peak.peak_above(lambda: [step() for step in steps])


def memory(rounds, task, data_dir, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    return memory_table(minilm_peak, rounds, picture, task=task, data_dir=data_dir)


def memory_table(measure, rounds, picture, **given):
    """The same for any pair of sides: measure(side, **given) is a peak in MiB."""
    import peft
    import transformers

    peaks = {PEER: [], OURS: []}
    for _ in range(rounds):
        for side, values in peaks.items():
            values.append(peak.in_fresh_process(measure, side=side, **given))
    lines = ["| side | peak MiB above the loaded model |", "|---|---|"]
    shown = {side: timing.spread(values) for side, values in peaks.items()}
    lines += [f"| {side} | {timing.show(three, 0)} |" for side, three in shown.items()]
    share = timing.show(timing.ratio(peaks[OURS], peaks[PEER]))
    lines += ["", f"ours against PEFT's: {share}"]
    lines.append(timing.conditions(rounds, transformers, peft))
    pictures.bars(picture, shown, "peak MiB above the loaded model")
    return lines


# -------------------------------------------------------------------------------------------- scale

BASE = {"t": 128, "b": 8, "layers": 4, "d": 256}
AXES = {"t": (32, 64, 128, 256, 512), "b": (2, 4, 8, 16), "layers": (2, 4, 8), "d": (128, 256, 512)}


def random_sides(side, t, b, layers, d, family="bert"):
    """A model of the given size with random weights, and one batch without padding."""
    ids = torch.randint(5, 1000, (b, t), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.arange(b) % 2
    torch.manual_seed(0)
    if side == OURS:
        shared = dict(vocab_size=1000, hidden_size=d, num_layers=layers, num_heads=d // 32)
        shared |= dict(ffn_dim=4 * d, max_positions=512, pad_token_id=1)
        if family == "bert":
            rest = dict(embed_dim=d, layer_norm_eps=1e-12, activation="gelu", type_vocab_size=2)
        else:  # OPT-350M
            rest = dict(embed_dim=512, layer_norm_eps=1e-5, activation="relu")
            rest |= dict(pre_ln=False, final_norm=False)
            shared["num_heads"] = 16
        features = FAMILIES[family].features
        model = Transformer(Config(family, **{**features, **shared, **rest}))
        return adapted(model), [batch]
    import transformers

    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=1000,
            hidden_size=d,
            num_hidden_layers=layers,
            num_attention_heads=d // 32,
            intermediate_size=4 * d,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    else:
        config = transformers.OPTConfig(
            vocab_size=1000,
            hidden_size=d,
            num_hidden_layers=layers,
            num_attention_heads=16,
            ffn_dim=4 * d,
            max_position_embeddings=512,
            word_embed_proj_dim=512,
            do_layer_norm_before=False,
            dropout=0.0,
        )
    peer = transformers.AutoModelForSequenceClassification.from_config(config)
    return peft_model(peer, family), [batch]


def random_peak(side, **size):
    """Peak MiB of three steps above the loaded model, for peak.in_fresh_process."""
    (step,) = training(*random_sides(side, **size))
    return peak.peak_above(lambda: [step() for _ in range(3)])


def point(rounds, **size):
    """(seconds of ours, of PEFT's, peak of ours, of PEFT's), lists for the seconds."""
    arms = {side: training(*random_sides(side, **size)) for side in (OURS, PEER)}
    seconds = timing.interleaved(arms, rounds)
    peaks = [peak.in_fresh_process(random_peak, side=side, **size) for side in (OURS, PEER)]
    return seconds[OURS], seconds[PEER], *peaks


def row(name, found):
    """One size as a line of the table; found: what point() returns."""
    ours, theirs, our_peak, their_peak = found
    return (
        f"| {name} | {1000 * statistics.median(ours):.0f} | "
        f"{timing.show(timing.ratio(theirs, ours))} | {our_peak:.0f} | "
        f"{their_peak / our_peak:.2f} |"
    )


def scale(rounds, picture):
    """Lines of the table; the picture goes to the path `picture`."""
    import peft
    import transformers

    lines = [
        "| size | ours, ms a step | PEFT's time / ours | ours, peak MiB | PEFT's peak / ours |",
        "|---|---|---|---|---|",
    ]
    upper, lower = [], []
    for axis, values in AXES.items():
        times, peaks = {OURS: [], PEER: []}, {OURS: [], PEER: []}
        for value in values:
            found = point(rounds, **{**BASE, axis: value})
            lines.append(row(f"{axis} = {value}", found))
            for i, side in enumerate((OURS, PEER)):
                times[side].append(1000 * statistics.median(found[i]))
                peaks[side].append(found[2 + i])
        upper.append((axis, "ms a step", {side: (values, ys) for side, ys in times.items()}))
        lower.append((axis, "peak MiB", {side: (values, ys) for side, ys in peaks.items()}))
    opt = point(rounds, t=128, b=4, layers=24, d=1024, family="opt")
    lines.append(row("OPT-350M-shaped: t = 128, b = 4, 24 layers, d = 1024", opt))
    others = ", ".join(f"{k} = {v}" for k, v in BASE.items())
    lines += ["", f"BERT-shaped, the others at {others}; r 8 on q, v; random weights, dropout 0"]
    lines.append(timing.conditions(rounds, transformers, peft))
    pictures.curves(picture, upper + lower)
    return lines
