"""The cases of the oracle for the relatives: inputs at generic points, as in cases.py.

Numbers are drawn as there. A and B of the optimizer rules are far enough from singular that their
Gram matrices can be inverted in float32, too.

What this file does not do: compute anything (ours_adapters.py, ours_rules.py), or judge (check.py).
"""

import torch

from tools.oracle.cases import ADAMW, Case, draw, examples, network

LOOSE = {"float64": 1e-9, "float32": 1e-3}
RITE_SEED = 163  # with it the g of A alone is set to 0, in step 2


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------- one layer


def layer(rng, inner, outer):
    """x, weight, bias, lora_alpha and grad; no method's own tensors."""
    return {
        "x": draw(rng, 6, inner),
        "weight": draw(rng, outer, inner),
        "bias": draw(rng, outer),
        "lora_alpha": 7,
        "grad": draw(rng, 6, outer),
    }


def layer_cases():
    """(case name, function, arguments, what it says, reference) of each method on one layer."""
    rng = generator(100)
    pair = {"lora_A": draw(rng, 3, 5), "lora_B": draw(rng, 4, 3)}
    given = {**layer(rng, 5, 4), **pair, "lora_magnitude": draw(rng, 4) + 2}
    what = "y = m o (V x) / ||V|| + b, V = W + (lora_alpha / r) B A, ||V|| row by row, a constant"
    yield "dora", "dora", given, what, "arXiv 2402.09353, Eq. 5 and section 4.3"
    pair = {"lora_A": draw(rng, 3, 4), "lora_B": draw(rng, 4, 3)}
    given = {**layer(rng, 4, 4), **pair, "lora_magnitude": draw(rng, 4) + 2}
    yield "dora-square", "dora", given, what, "arXiv 2402.09353, Eq. 5 and section 4.3"
    v = torch.tensor([2, 1, 2, 1, 1, 2, 1]).double()  # v^T v = 16, so that I - v v^T / 8 is exact
    A = (torch.eye(7) - torch.outer(v, v) / 8)[:3]  # rows of an orthogonal matrix
    given = {**layer(rng, 7, 4), "lora_A": A, "lora_B": draw(rng, 4, 3)}
    what = "y = W x + b + (lora_alpha / r) B A x; A is frozen, its rows are orthonormal"
    yield "asymmetry", "asymmetry", given, what, "arXiv 2402.16842"
    what = "y = W x + b + (lora_alpha / r) U_r R S_r V_r^T x; in U_r the largest entries are > 0"
    for name, outer in (("lora_xs", 4), ("lora_xs-square", 5)):
        given = {**layer(rng, 5, outer), "lora_R": draw(rng, 3, 3)}
        yield name, "lora_xs", given, what, "arXiv 2405.17604, section 3"
    what = "A and B^T are a chunk and its copies, rotated along the ranks, and u plain ranks"
    for name, inner, outer, shared, x_A, x_B in (
        ("prolora", 6, 8, 4, 2, 4),
        ("prolora-few-ranks", 9, 4, 2, 3, 2),
    ):
        given = {
            **layer(rng, inner, outer),
            "lora_A_shared": draw(rng, shared, inner // x_A),
            "lora_A_own": draw(rng, 1, inner),
            "lora_B_shared": draw(rng, outer // x_B, shared),
            "lora_B_own": draw(rng, outer, 1),
            "x_A": x_A,
            "x_B": x_B,
            "lora_alpha": 11,
        }
        yield name, "prolora", given, what, "arXiv 2402.16902"
    given = {**layer(rng, 6, 5), "index": torch.tensor([4, 1, 2]), "lora_B": draw(rng, 5, 3)}
    what = "y = W x + b + (lora_alpha / r) B x[S]"
    yield "sbora_fa", "sbora_fa", given, what, "arXiv 2407.05413"
    given = {**layer(rng, 6, 5), "index": torch.tensor([3, 1, 2]), "lora_A": draw(rng, 3, 6)}
    what = "y = W x + b, and (lora_alpha / r) A x added to the outputs S"
    yield "sbora_fb", "sbora_fb", given, what, "arXiv 2407.05413"
    E = draw(rng, 3, 1) * torch.tensor([[1.0], [0.0], [1.0]])
    given = {**layer(rng, 5, 4), "lora_A": draw(rng, 3, 5), "lora_E": E, "lora_B": draw(rng, 4, 3)}
    what = "y = W x + b + (lora_alpha / r) B diag(E) A x; one E is 0, and counts in r"
    yield "adalora", "adalora", given, what, "arXiv 2303.10512, section 3.1"


# ---------------------------------------------------------------------- one place in several blocks


def blocks_of(rng, count, inner, outer, **own):
    """Blocks with x, weight, grad and own tensors, given by their shapes; n differs."""
    blocks = []
    for i in range(count):
        n = 5 + i if not own.get("same_n") else 5
        block = {"x": draw(rng, n, inner), "weight": draw(rng, outer, inner)}
        block["grad"] = draw(rng, n, outer)
        blocks.append(block | {k: draw(rng, *v) for k, v in own.items() if k != "same_n"})
    return blocks


def block_cases():
    """The same of methods that share between modules."""
    rng = generator(110)
    pair = {"lora_A": draw(rng, 3, 5), "lora_B": draw(rng, 4, 3), "lora_alpha": 7}
    given = {"blocks": blocks_of(rng, 3, 5, 4, lora_u=(3,), lora_v=(4,)), **pair}
    what = "y = W x + (lora_alpha / r) diag(v) B diag(u) A x; A and B are those of all three blocks"
    yield "tied", "tied", given, what, "arXiv 2311.09578"
    pair = {"lora_A": draw(rng, 3, 4), "lora_B": draw(rng, 4, 3), "lora_alpha": 7}
    given = {"blocks": blocks_of(rng, 3, 4, 4), **pair}
    what = "y = W x + (lora_alpha / r) (W Theta_B) (Theta_A W^T) x; one Theta_A, Theta_B for all"
    yield "condlora", "condlora", given, what, "arXiv 2403.14946"
    given = {
        "x": draw(rng, 6, 5),
        "weights": [draw(rng, 5, 5) for _ in range(3)],
        "lora_A": [draw(rng, 3, 5) for _ in range(3)],
        "lora_alpha": 7,
        "grads": [draw(rng, 6, 5) for _ in range(3)],
    }
    what = "y = W x + (lora_alpha / r) U_r A x, [W_q, W_k, W_v] = U S V^T; largest entries of U > 0"
    yield "cora", "cora", given, what, "arXiv 2409.02119"
    formulas = {
        "input": "B_n A_n (x_n + x_{n-1})",
        "block": "sum_{k = 0 … 2} B_{n-k} A_{n-k} x_n",
        "middle": "B_n (A_n x_n + sum_{k = 1, 2} A_{n-k} x_{n-k})",
    }
    for kind, formula in formulas.items():
        own = {"lora_A": (3, 5), "lora_B": (4, 3), "same_n": True}
        blocks = blocks_of(rng, 5, 5, 4, **own)
        pre = 1 if kind == "input" else 2
        given = {"kind": kind, "blocks": blocks, "pre": pre, "lora_alpha": 7}
        what = f"y_n = W_n x_n + (lora_alpha / r) {formula}"
        yield f"reslora-{kind}", "reslora", given, what, "arXiv 2402.18039"


LEFT_OUT = ("x", "bias", "grad", "grads")  # of what weight_change is given


def without_inputs(arguments):
    given = {k: v for k, v in arguments.items() if k not in LEFT_OUT}
    if "blocks" in given:
        given["blocks"] = [without_inputs(block) for block in given["blocks"]]
    return given


def adapter_cases():
    """Each method's forward and gradients; and what it adds to W, from the same numbers."""
    cases = []
    for name, function, arguments, what, reference in (*layer_cases(), *block_cases()):
        cases.append(Case(name, function, arguments, what, reference))
        if name in ("reslora-input", "reslora-middle"):
            continue
        given = {"method": function, "given": without_inputs(arguments)}
        about = f"what is added to W, where {what}"
        cases.append(Case(f"weight_change-{name}", "weight_change", given, about, reference))
    return cases


# -------------------------------------------------------------------------------------------- rules


def near(rng, rows, columns):
    """(rows, columns) with singular values of the order of 1: numbers on a diagonal, and others."""
    return torch.eye(rows, columns) + draw(rng, rows, columns, scale=0.5)


def gradients_of(rng, outer, inner, *scales):
    """[dL/dW of each step], of given sizes."""
    return [draw(rng, outer, inner, scale=scale) for scale in scales]


def rule_cases():
    """Three steps of each rule, with all its moments."""
    rng, cases = generator(120), []
    pair = {"lora_A": near(rng, 3, 5).double(), "lora_B": near(rng, 4, 3).double()}
    start = {**pair, "lora_alpha": 7, "gradients": gradients_of(rng, 4, 5, 1, 1, 1)}
    given = {**start, "adamw": {**ADAMW, "lr": 0.0625}}
    zero = {**given, "lora_B": 0 * pair["lora_B"]}
    text = "three steps of AdamW, lr of B = ratio times that of A"
    arguments = {**given, "ratio": 6}
    cases.append(Case("loraplus", "loraplus", arguments, text, "arXiv 2402.12354, section 4"))
    text, delta = "AdamW on (B^T B + delta I)^-1 gA and gB (A A^T + delta I)^-1", {"delta": 0.125}
    for name, point in (("riemannian", given), ("riemannian-b0", zero)):
        arguments = {**point, **delta}
        cases.append(Case(name, "riemannian", arguments, text, "arXiv 2402.02347", LOOSE))
    text = "AdamW on the two gradients that come nearest to the full one's effect"
    for name, point in (("lora_pro", given), ("lora_pro-b0", zero)):
        reference = "arXiv 2407.18242, theorems 2.1 and 2.3"
        cases.append(Case(name, "lora_pro", point, text, reference, LOOSE))
    return [*cases, *step_cases(), *rite_cases(pair)]


def step_cases():
    """Riemannian steps without moments: of a pair, of the same one in another basis, with delta."""
    rng, cases = generator(130), []
    A, B, G = near(rng, 3, 5).double(), near(rng, 4, 3).double(), draw(rng, 4, 5)
    change = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [0.0, 0.0, 1.0]]).double()
    back = torch.tensor([[1.0, -2.0, -2.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]).double()
    text = "A <- A - lr (B^T B + delta I)^-1 gA, B <- B - lr gB (A A^T + delta I)^-1"
    for name, a, b, delta, more in (
        ("riemannian_step", A, B, 0, "delta = 0"),
        ("riemannian_step-turned", change @ A, B @ back, 0, "the same with (R A, B R^-1)"),
        ("riemannian_step-delta", A, B, 0.25, "delta = 0.25"),
    ):
        given = {"lora_A": a, "lora_B": b, "gradient": G, "lora_alpha": 7, "lr": 0.125}
        arguments, about = {**given, "delta": delta}, f"{text}; {more}"
        reference = "arXiv 2402.02347, Eq. 4"
        cases.append(Case(name, "riemannian_step", arguments, about, reference, LOOSE))
    return cases


def rite_cases(pair):
    """LoRA-RITE: all gradients are clipped, one is set to 0 in the second step; B = 0."""
    rng, cases, adamw = generator(RITE_SEED), [], {**ADAMW, "lr": 0.0625, "betas": [0.9, 0.99]}
    del adamw["eps"]
    small = gradients_of(rng, 4, 5, 0.375, 0.375, 0.375)
    large = [small[0], gradients_of(rng, 4, 5, 1)[0], small[2]]
    zero = {**pair, "lora_B": 0 * pair["lora_B"]}
    for name, start, gradients, more in (
        ("lora_rite", pair, large, "all are clipped; in step 2 the g of A is set to 0"),
        ("lora_rite-b0", zero, small, "B = 0: A waits a step"),
    ):
        arguments = {**start, "lora_alpha": 7, "gradients": gradients, "adamw": adamw}
        about, reference = f"three steps; {more}", "arXiv 2410.20625, Algorithm 1"
        cases.append(Case(name, "lora_rite", arguments, about, reference, LOOSE))
    return cases


# ------------------------------------------------------------------------------------------ budgets


def adalora_cases():
    rng, cases, reference = generator(150), [], "arXiv 2303.10512, section 3"
    given = {"total": 24, "target": 7, "warmup": 2, "final": 7, "steps": 17}
    text = "b(t) for t = 1 … 17: 24 triplets, then fewer by a cubic, then 7"
    cases.append(Case("adalora_schedule", "adalora_schedule", given, text, reference))

    def triplets():
        return {"lora_A": draw(rng, 3, 5), "lora_E": draw(rng, 3, 1), "lora_B": draw(rng, 4, 3)}

    given = {
        "weights": [triplets() for _ in range(4)],
        "gradients": [triplets() for _ in range(3)],
    }
    text = "S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik) after three steps, s = I U"
    cases.append(Case("adalora_scores", "adalora_scores", given, text, reference))
    shapes = ((5, 4, 3), (6, 3, 2))
    pairs = [{"lora_A": draw(rng, r, n), "lora_B": draw(rng, m, r)} for n, m, r in shapes]
    text = "the gradient of 0.1 times the mean of ||A A^T - I||_F and ||B^T B - I||_F"
    cases.append(Case("adalora_penalty", "adalora_penalty", {"pairs": pairs}, text, reference))
    names = [f"layers.{i}.{p}/{k}" for i in range(2) for p in ("q_proj", "fc1") for k in range(4)]
    values = (torch.randperm(len(names), generator=rng) + 1).tolist()
    apart = dict(zip(names, (v / 8 for v in values), strict=True))
    tied = {name: float((v + 2) // 4) for name, v in zip(names, values, strict=True)}
    for name, scores, keep, more in (
        ("adalora_keep", apart, 6, "the 6 best triplets of all modules"),
        ("adalora_keep-ties", tied, 6, "ties: 6 all the same; any of the tied may stay"),
    ):
        arguments = {"scores": scores, "budget": keep}
        cases.append(Case(name, "adalora_keep", arguments, more, "arXiv 2303.10512, Eq. 6"))
    return cases


MODULES = {"q": 3, "k": 2, "v": 4, "fc1": 3, "fc2": 3}  # ranks of each


def alora_cases():
    rng, cases, reference = generator(160), [], "arXiv 2403.16187, Algorithm 1"
    batches = [examples(rng, n) for n in (4, 7, 2)]
    given = {"layers": network(rng), "batches": batches}
    text = "IS(k) = S(M) - S(M without k) + S(M with k alone), S = -L"
    cases.append(Case("alora_importance", "alora_importance", given, text, reference))
    names = [f"{m}/{k}" for m, n in MODULES.items() for k in range(n)]
    values = [21, 5, 6, 18, 13, 3, 1, 2, 4, 19, -20, 17, 17, 6.5, 13]
    spread = dict(zip(names, (v / 8 for v in values), strict=True))
    tied = {**spread, **dict.fromkeys(("q/0", "q/1", "v/0", "v/2", "v/3"), spread["v/1"])}
    del tied["fc2/2"]
    for name, importance, places, more in (
        ("alora_exchange", spread, 6, "5 modules: 5 ranks go, 5 grow where none went"),
        ("alora_exchange-full", spread, 4, "4 places a module: fewer can grow, so fewer go"),
        ("alora_exchange-ties", tied, 6, "equal importance: the first in the order given goes"),
    ):
        on = {m: sum(n.startswith(f"{m}/") for n in importance) for m in MODULES}
        given = {"importance": importance, "places": dict.fromkeys(on, places), "on": on}
        cases.append(Case(name, "alora_exchange", given, more, reference))
    return cases


def all_cases():
    return [*adapter_cases(), *rule_cases(), *adalora_cases(), *alora_cases()]
