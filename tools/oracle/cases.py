"""The cases of the oracle: inputs at generic points, in words and symbols; no expected values.

Every number of a tensor is a multiple of 2^-12 below 4, drawn from a seeded integer generator: the
same on every machine, and exact in float32.

A function of ours.py has its cases in one function here, whose name is in all_cases at the end.

What this file does not do: compute anything (ours.py), or judge (check.py).
"""

import dataclasses

import torch

D, FFN, HEADS, VOCAB, LABELS = 8, 12, 2, 30, 3
SHARED = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 2, "num_labels": LABELS}
CONFIGS = {
    "bert": {
        **SHARED,
        "model_type": "bert",
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "opt": {
        **SHARED,
        "model_type": "opt",
        "num_attention_heads": HEADS,
        "ffn_dim": FFN,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": D,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "pad_token_id": 1,
        "dropout": 0.0,
    },
}
LINEARS = {  # ends of full paths: (out, in)
    "bert": {
        "attention.self.query": (D, D),
        "attention.self.key": (D, D),
        "attention.self.value": (D, D),
        "attention.output.dense": (D, D),
        "intermediate.dense": (FFN, D),
        "output.dense": (D, FFN),
    },
    "opt": {
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (D, D),
        "self_attn.v_proj": (D, D),
        "self_attn.out_proj": (D, D),
        "fc1": (FFN, D),
        "fc2": (D, FFN),
    },
}
SHORTCUTS = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")
STACK = {"bert": "bert.encoder.layer", "opt": "model.decoder.layers"}
ADAMW = {"lr": 0.05, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}
SETTINGS = {  # of the two runs
    "every": 2,
    "score_batches": 2,
    "keep": 0.4,
    "delta_ratio": 0.5,
    "delta_start": 1,
    "adamw": {**ADAMW, "lr": 0.1},
}
RUN_SEED, SHORT_RUN_SEED = 51, 133  # in both runs something goes off and returns


@dataclasses.dataclass
class Case:
    """function(**arguments) is checked; tolerance by dtype, relative to the largest value."""

    name: str
    function: str
    arguments: dict
    about: str
    reference: str
    tolerance: dict = dataclasses.field(default_factory=lambda: {"float64": 1e-9, "float32": 1e-4})


def draw(rng, *shape, scale=1.0):
    """Float64 multiples of 2^-12 between -scale and scale."""
    whole = torch.randint(-4096, 4097, shape, generator=rng)
    return (whole * scale).round().double() / 4096


# ----------------------------------------------------------------------------------- one LoRA layer


def layer_cases():
    """Forward, backward and merge: a Linear, a Conv1D, and both where in = out."""
    cases, formula = [], "y = W x + b + (lora_alpha / r) B A x"
    kinds = [("linear", 5, 4), ("transposed", 5, 4), ("square", 4, 4), ("square-transposed", 4, 4)]
    for seed, (kind, inner, outer) in enumerate(kinds):
        rng = torch.Generator().manual_seed(seed)
        weight, bias = draw(rng, outer, inner), draw(rng, outer)
        factors = {
            "lora_A": draw(rng, 3, inner),
            "lora_B": draw(rng, outer, 3),
            "lora_alpha": 7,
            "transposed": kind.endswith("transposed"),
        }
        weight = weight.T.contiguous() if factors["transposed"] else weight
        inputs = {"x": draw(rng, 6, inner), "weight": weight, "bias": bias, **factors}
        stored = "W stored (in, out)" if factors["transposed"] else "W stored (out, in)"
        cases.append(
            Case(
                f"forward-{kind}",
                "lora_forward",
                inputs,
                f"{formula}; r 3, {stored}",
                "arXiv 2106.09685, Eq. 3",
            )
        )
        cases.append(
            Case(
                f"backward-{kind}",
                "lora_backward",
                {**inputs, "grad": draw(rng, 6, outer)},
                "dL/dB = s G A^T, dL/dA = s B^T G with G = dL/dW; dL/dx = (W + s B A)^T dL/dy",
                "arXiv 2106.09685, Eq. 3, differentiated",
            )
        )
        cases.append(
            Case(
                f"merge-{kind}",
                "merge",
                {"weight": weight, **factors},
                "W + (lora_alpha / r) B A, stored as W came",
                "arXiv 2106.09685, section 4.1",
            )
        )
    return cases


# ------------------------------------------------------------------------------ a small transformer


def weights_of(family, rng):
    """All tensors of a two-layer model under their Hugging Face names; no LayerNorm is trivial."""
    prefix = {"bert": "bert.embeddings.", "opt": "model.decoder."}[family]
    shapes = {
        "bert": {
            "word_embeddings.weight": (VOCAB, D),
            "position_embeddings.weight": (16, D),
            "token_type_embeddings.weight": (2, D),
            "LayerNorm.weight": (D,),
            "LayerNorm.bias": (D,),
        },
        "opt": {
            "embed_tokens.weight": (VOCAB, D),
            "embed_positions.weight": (18, D),
            "final_layer_norm.weight": (D,),
            "final_layer_norm.bias": (D,),
        },
    }[family]
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    norms = {
        "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
        "opt": ("self_attn_layer_norm", "final_layer_norm"),
    }[family]
    for i in range(2):
        for place, shape in {**LINEARS[family], **dict.fromkeys(norms, (D,))}.items():
            shapes[f"{STACK[family]}.{i}.{place}.weight"] = shape
            shapes[f"{STACK[family]}.{i}.{place}.bias"] = shape[:1]
    if family == "bert":
        shapes |= {"bert.pooler.dense.weight": (D, D), "bert.pooler.dense.bias": (D,)}
        shapes |= {"classifier.weight": (LABELS, D), "classifier.bias": (LABELS,)}
    else:
        shapes["score.weight"] = (LABELS, D)
    result = {}
    for name, shape in shapes.items():
        gain = len(shape) == 1 and name.endswith("weight")
        result[name] = draw(rng, *shape, scale=0.5) + gain
    return result


def adapters_of(family, rng, places, zero_b=False):
    """{full path: lora_A, lora_B, lora_alpha}; r 2, alpha 3, shortcuts with alpha 1."""
    adapters = {}
    for i in range(2):
        for place in places:
            if place == "shortcut_ffn" and i == 0:
                continue  # nothing comes before the first layer
            outer, inner = LINEARS[family].get(place, (D, D))
            lora_B = draw(rng, outer, 2, scale=0.5) * (not zero_b)
            adapters[f"{STACK[family]}.{i}.{place}"] = {
                "lora_A": draw(rng, 2, inner, scale=0.5),
                "lora_B": lora_B,
                "lora_alpha": 1 if place in SHORTCUTS else 3,
            }
    return adapters


def batch_of(family, rng, lengths=(7, 3, 5)):
    """Three examples of unequal length, padded on the right."""
    b, t = len(lengths), max(lengths)
    mask = torch.arange(t)[None] < torch.tensor(lengths)[:, None]  # (b, t)
    pad = CONFIGS[family]["pad_token_id"]
    ids = torch.randint(3, VOCAB, (b, t), generator=rng).where(mask, torch.tensor(pad))
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if family == "bert":
        batch["token_type_ids"] = torch.randint(0, 2, (b, t), generator=rng) * mask
    batch["labels"] = torch.randint(0, LABELS, (b,), generator=rng)
    return batch


def model_arguments(family, seed, places, zero_b=False):
    rng = torch.Generator().manual_seed(seed)
    return {
        "config": CONFIGS[family],
        "weights": weights_of(family, rng),
        "adapters": adapters_of(family, rng, places, zero_b),
    }, rng


def logits_cases():
    cases = []
    for family in ("bert", "opt"):
        for kind, extra in (("lora", ()), ("shortcuts", SHORTCUTS)):
            arguments, rng = model_arguments(family, 10, (*LINEARS[family], *extra))
            about = "logits with LoRA on all six linear layers"
            if extra:
                about += (
                    "; residual_1: (I + s B A) x around self-attention, residual_2 around the "
                    "FFN; shortcut_sa: this layer's attention input, times s B A, onto its "
                    "output; shortcut_ffn: the previous layer's FFN input onto this layer's"
                )
            cases.append(
                Case(
                    f"logits-{family}-{kind}",
                    "logits",
                    {**arguments, "batch": batch_of(family, rng)},
                    about,
                    "arXiv 2406.14956, section 3 and Figure 1",
                )
            )
    return cases


PROXY_TEXTS = {
    "grad_norm": "||dL/dA||_F + ||dL/dB||_F",
    "snip": "sum |A o dL/dA| + sum |B o dL/dB|",
    "synflow": "sum |A o dR/dA| + sum |B o dR/dB|, R: the sum over the output of |net| for one "
    "token of ones, without LayerNorm, activation and head, attention weights S / S, where q and k "
    "take the residual stream as a constant",
    "synflow_released": "the same with |net| as it is, ones for the word embeddings of the first "
    "batch, and its loss for R",
    "grasp": "sum theta o (H g) over A and B; the sign that keeps what holds the gradient up",
    "fisher": "1/2 mean_n sum_k (A_k . dL_n/dA_k)^2, n over examples",
    "alpha_test": "10 x the smallest a in 0, 0.1 … 1 at which a s B A in place of s B A keeps 0.99 "
    "of the accuracy, by binary search",
    "alpha_test_released": "the same with a on the whole linear layer, bias included",
    "grad_norm_slot": "||dL/dW||_F of the weight, the identity (residual) or zero (cross)",
    "snip_slot": "sum |W o dL/dW| of the same",
    "constant": "1",
}


def score_cases():
    """Every proxy at B = 0 and B != 0, with shortcuts and without; ranks."""
    cases = []
    for point in ("b0", "b"):
        for kind, extra in (("lora", ()), ("shortcuts", SHORTCUTS)):
            arguments, rng = model_arguments("bert", 20, (*LINEARS["bert"], *extra), point == "b0")
            batches = [batch_of("bert", rng), batch_of("bert", rng, (4, 6))]
            for proxy, text in PROXY_TEXTS.items():
                if extra and proxy not in ("grad_norm", "snip", "grad_norm_slot"):
                    continue
                cases.append(
                    Case(
                        f"scores-{proxy}-{point}-{kind}",
                        "scores",
                        {"proxy": proxy, **arguments, "batches": batches},
                        f"S = {text}; L: mean over all 5 examples of both batches; "
                        f"B {'= 0' if point == 'b0' else '!= 0'}",
                        "arXiv 2406.14956, section 3; proxies.py",
                    )
                )
            for proxy in ("grad_norm", "snip"):
                if extra and point == "b0":
                    continue
                cases.append(
                    Case(
                        f"ranks-{proxy}-{point}" + ("-shortcuts" if extra else ""),
                        "rank_scores",
                        {"proxy": proxy, **arguments, "batches": batches},
                        f"S_k = {PROXY_TEXTS[proxy]}, of row k of A and column k of B",
                        "relatives/rank_scores.py, score_ranks",
                    )
                )
    return cases


# --------------------------------------------------------------------------------------- allocation


def allocation_cases():
    """Fractions, ties, budgets with mixed sizes, and what is impossible."""
    rng = torch.Generator().manual_seed(30)
    places = ("q_proj", "v_proj", "residual_1", "residual_2", "shortcut_sa")
    names = [f"layers.{i}.{p}" for i in range(6) for p in places]
    values = dict(zip(names, (torch.randperm(len(names), generator=rng) + 1).tolist(), strict=True))
    return [*fraction_cases(values), *budget_cases(values)]


def fraction_cases(values):
    """keep_top; values: dict name -> 1 … n, each once."""
    cases, reference = [], "arXiv 2406.14956, section 3; dyrealloc_callback.py"
    scores = {n: v / 8 for n, v in values.items()}
    tied = {n: float(v % 3) for n, v in values.items()}
    rule = "the best floor(p n_l) + round(p n_s) of n_l modules and n_s shortcuts"
    for keep in (0.1, 0.25, 0.3, 0.5, 0.55, 1.0):
        for together in (True, False):
            cases.append(
                Case(
                    f"keep-{keep}-{'together' if together else 'apart'}",
                    "keep_top",
                    {"scores": scores, "keep": keep, "together": together},
                    f"{rule}; p = {keep}, " + ("one ranking" if together else "ranked apart"),
                    reference,
                )
            )
    text = f"{rule}; ties: any of the tied may be on, no better one may be off"
    arguments = {"scores": tied, "keep": 0.4, "together": True}
    cases.append(Case("keep-ties", "keep_top", arguments, text, reference))
    signed = {n: v - 2 for n, v in scores.items()}  # half of them negative, as GraSP's may be
    for together in (True, False):
        arguments = {"scores": signed, "keep": 0.3, "together": together}
        text = f"{rule}; p = 0.3; negative scores are the smallest"
        name = f"keep-negative-{'together' if together else 'apart'}"
        cases.append(Case(name, "keep_top", arguments, text, reference))
    arguments = {"scores": scores, "keep": 0.01, "together": True}
    cases.append(Case("keep-nothing", "keep_top", arguments, "none to keep: ValueError", reference))
    return cases


def budget_cases(values):
    """within_budget; values: dict name -> 1 … n, each once."""
    cases, scores = [], {n: v / 8 for n, v in values.items()}
    signed = {n: v - 2 for n, v in scores.items()}
    for i, sizes in enumerate([(16,), (16, 40), (7, 11, 13, 29)]):
        costs = {n: sizes[v % len(sizes)] for n, v in values.items()}
        mixed = {n: s * (1 + costs[n] / 20) for n, s in scores.items()}
        for share in (0.1, 0.3, 0.6):
            arguments = {
                "scores": mixed,
                "costs": costs,
                "budget": int(share * sum(costs.values())) + i,
            }
            cases.append(
                Case(
                    f"budget-{len(sizes)}-sizes-{share}",
                    "within_budget",
                    arguments,
                    "the largest sum of scores with sum of costs <= budget (any best set)",
                    "0/1 knapsack, exact",
                )
            )
    costs = {n: (9, 25, 64)[v % 3] for n, v in values.items()}
    arguments = {"scores": scores, "costs": costs, "budget": 333}
    text = "scores that have nothing to do with the sizes"
    cases.append(Case("budget-any-sizes", "within_budget", arguments, text, "0/1 knapsack, exact"))
    costs = {n: (16, 40)[v % 2] for n, v in values.items()}
    arguments = {"scores": signed, "costs": costs, "budget": 500}
    text = "negative scores: never worth their cost"
    cases.append(Case("budget-negative", "within_budget", arguments, text, "0/1 knapsack, exact"))
    arguments = {"scores": scores, "costs": dict.fromkeys(scores, 9), "budget": 8}
    text = "the budget is smaller than every module: ValueError"
    cases.append(Case("budget-impossible", "within_budget", arguments, text, "exact"))
    return cases


# ----------------------------------------------------------------------------------------- training


def training_cases():
    """Delta-LoRA step by step, and one whole run."""
    cases, loose = [], {"float64": 1e-8, "float32": 1e-3}
    for start, ratio, r, lora_alpha in ((-1, 0.5, 2, 3), (3, 2.0, 2, 3), (1, 0.5, 3, 7)):
        rng = torch.Generator().manual_seed(40)
        arguments = {
            "weight": draw(rng, 4, 5),
            "lora_A": draw(rng, r, 5),
            "lora_B": draw(rng, 4, r, scale=0.5),
            "lora_alpha": lora_alpha,
            "x": draw(rng, 7, 5),
            "y": draw(rng, 7, 4),
            "ratio": ratio,
            "start": start,
            "steps": 12,
            "adamw": ADAMW,
        }
        cases.append(
            Case(
                f"delta-start{start}",
                "delta_lora",
                arguments,
                "W <- W + ratio (lora_alpha / r) (B' A' - B A) after optimizer steps "
                f"{start + 2} … 12 (t from 0, strict t > {start}); AdamW on A and B",
                "arXiv 2309.02411, Algorithm 1",
                loose,
            )
        )
    arguments, rng = model_arguments("bert", RUN_SEED, (*LINEARS["bert"], *SHORTCUTS))
    cases.append(
        Case(
            "run",
            "train",
            {
                **arguments,
                "batches": [batch_of("bert", rng, (7, 3, 5)[: 3 - i % 2]) for i in range(8)],
                "settings": SETTINGS,
            },
            "8 steps, decisions before steps 0, 2, 4, 6 by GRAD-NORM, together, all modules "
            "scored; some go off and return; Delta-LoRA on what is on and linear",
            "arXiv 2406.14956, dynamic; arXiv 2309.02411",
            loose,
        )
    )
    return cases


# ---------------------------------------------------------------------------------- a small network


def network(rng, zero_b=False):
    """Four layers, 6 -> 7 -> 5 -> 6 -> 3, no two alike in r and lora_alpha."""
    layers = []
    for inner, outer, r, lora_alpha in ((6, 7, 3, 7), (7, 5, 2, 5), (5, 6, 3, 4), (6, 3, 2, 3)):
        layers.append(
            {
                "weight": draw(rng, outer, inner, scale=0.75),
                "lora_A": draw(rng, r, inner, scale=0.5),
                "lora_B": draw(rng, outer, r, scale=0.5) * (not zero_b),
                "lora_alpha": lora_alpha,
            }
        )
    return layers


def examples(rng, n):
    x = draw(rng, n, 6, scale=2.0)
    return {"x": x, "labels": torch.randint(0, LABELS, (n,), generator=rng)}


def network_cases():
    """Proxies at B = 0 and B != 0, and a run of both methods, on four matrices."""
    cases, texts = [], {**PROXY_TEXTS, "snip_ranks": PROXY_TEXTS["snip"] + ", by rank-one part"}
    texts["synflow"] = "sum |A o dR/dA| + sum |B o dR/dB|, R: the sum of |net|'s output for ones"
    for point in ("b0", "b"):
        rng = torch.Generator().manual_seed(60)
        layers = network(rng, zero_b=point == "b0")
        batches = [examples(rng, n) for n in (4, 7, 2)]
        for function in ("grad_norm", "snip", "snip_ranks", "synflow"):
            arguments = {"layers": layers, "batches": batches}
            if function == "synflow":
                del arguments["batches"]
            about = f"S = {texts[function]}; B {'= 0' if point == 'b0' else '!= 0'}"
            reference = "arXiv 2406.14956, section 3; proxies.py"
            cases.append(Case(f"{function}-{point}", function, arguments, about, reference))
    rng = torch.Generator().manual_seed(SHORT_RUN_SEED)
    layers = network(rng)
    batches = [examples(rng, n) for n in (4, 7, 2, 5, 3, 6, 4, 8)]
    cases.append(
        Case(
            "short_run",
            "short_run",
            {"layers": layers, "batches": batches, "settings": {**SETTINGS, "keep": 0.5}},
            "8 steps, decisions before steps 0, 2, 4, 6 by GRAD-NORM, all layers scored; some go "
            "off and return; Delta-LoRA on what is on",
            "arXiv 2406.14956, dynamic; arXiv 2309.02411",
            {"float64": 1e-8, "float32": 1e-3},
        )
    )
    return cases


def delta_cases():
    """One step of Delta-LoRA, and a finished run as an adapter."""
    cases, reference = [], "arXiv 2309.02411, Algorithm 1"
    for name, outer in (("delta_step", 4), ("delta_step-square", 5)):
        rng = torch.Generator().manual_seed(70 + outer)
        arguments = {
            "weight": draw(rng, outer, 5),
            "old_A": draw(rng, 3, 5),
            "old_B": draw(rng, outer, 3),
            "new_A": draw(rng, 3, 5),
            "new_B": draw(rng, outer, 3),
            "lora_alpha": 7,
            "ratio": 0.75,
        }
        about = "W + ratio (lora_alpha / r) (B' A' - B A)"
        cases.append(Case(name, "delta_step", arguments, about, reference))
    for start in (-1, 2):
        rng = torch.Generator().manual_seed(80)
        began = torch.arange(7) > 0 if start == -1 else torch.ones(7)  # B = 0 at first, or not
        arguments = {
            "lora_A": draw(rng, 7, 2, 6),
            "lora_B": draw(rng, 7, 5, 2) * began[:, None, None],
            "lora_alpha": 5,
            "ratio": 0.75,
            "start": start,
        }
        about = "B' A' = s B_T A_T + ratio s (B_T A_T - B_b A_b), b = start + 1, R <= 2r"
        name = f"delta_adapter-start{start}"
        cases.append(Case(name, "delta_adapter", arguments, about, reference))
    return cases


def all_cases():
    return [
        *layer_cases(),
        *logits_cases(),
        *score_cases(),
        *allocation_cases(),
        *training_cases(),
        *network_cases(),
        *delta_cases(),
    ]
