"""Both papers on a tiny language model of LLaMA's kind: proxies, allocation, Delta-LoRA, relatives.

The reference is dense.py, which knows no module: a loss there is a mean over labelled tokens,
written out. Every batch has prompts without labels and texts of unequal length.
"""

import copy
import warnings

import pytest
import torch

import allocate
import dense
import lora
import proxies
import tiny
from delta_lora import DeltaLoRA
from relatives import METHODS

ALL = lora.SHORTCUTS["all"]
PROMPTS = (4, 1, 3)  # tokens without a label, of texts of 9, 4 and 6


def batch_of(m, seed=0, lengths=(9, 4, 6)):
    batch = tiny.batch(m.config, seed, lengths)
    for row, prompt in zip(batch["labels"], PROMPTS, strict=False):
        row[:prompt] = -100
    return batch


def problem(family="llama", **overrides):
    """Every place adapted; two batches of 11 and 8 labelled tokens."""
    m = tiny.adapted(family, shortcuts=ALL, head="lm", num_layers=2, **overrides)
    return m, [batch_of(m), batch_of(m, 1, (7, 6))]


def terms(m, batch):
    """[the losses of one example's labelled tokens] for each example, by dense.py."""
    found = []
    for row, logits in zip(batch["labels"].tolist(), dense.logits(m, batch), strict=True):
        log_p = logits.log_softmax(-1)
        found.append([-log_p[t - 1, y] for t, y in enumerate(row) if t and y != -100])
    return found


def mean_loss(m, batches):
    """Of all labelled tokens of all batches in one."""
    losses = [loss for batch in batches for example in terms(m, batch) for loss in example]
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------------------------ proxies


def place_gradients(monkeypatch, m, batches):
    """{name: dL/dM} of the dense matrix M in every place."""
    matrices = {n: (w.detach().requires_grad_(True), b) for n, (w, b) in dense.effective(m).items()}
    monkeypatch.setattr(dense, "effective", lambda _: matrices)
    names = list(lora.adapters(m))
    leaves = [matrices[name][0] for name in names]
    gradients = torch.autograd.grad(mean_loss(m, batches), leaves)
    monkeypatch.undo()
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_scores_of_first_order_from_the_gradient_of_the_place(family, monkeypatch):
    """dL/dA = s B^T G and dL/dB = s G A^T, with G by autograd through dense matrices."""
    m, batches = problem(family)
    G = place_gradients(monkeypatch, m, batches)
    expected = {name: {} for name in ("grad_norm", "snip", "grad_norm_slot", "snip_slot")}
    for name, layer in lora.adapters(m).items():
        A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_alpha / layer.r
        gA, gB = s * B.T @ G[name], s * G[name] @ A.T
        place = name.rpartition(".")[2]
        W = torch.eye(12) * (place in lora.RESIDUALS) if place in ALL else layer.base.weight
        expected["grad_norm"][name] = (gA**2).sum().sqrt() + (gB**2).sum().sqrt()
        expected["snip"][name] = (A * gA).abs().sum() + (B * gB).abs().sum()
        expected["grad_norm_slot"][name] = (G[name] ** 2).sum().sqrt()
        expected["snip_slot"][name] = (W.detach() * G[name]).abs().sum()
    for proxy, values in expected.items():
        scores = proxies.score(proxy, m, batches)
        assert len(scores) == 2 * 7 + 2 * 4 - 1
        assert scores == pytest.approx({n: v.item() for n, v in values.items()}, rel=1e-9)


def test_grasp_is_the_change_of_the_gradient_norm():
    """theta . H g: the slope of 1/2 ||g||^2 where one pair is scaled by 1 + e."""
    m, batches = problem()
    scores, layers = proxies.score("grasp", m, batches), lora.adapters(m)
    pairs = [p for a in layers.values() for p in (a.lora_A, a.lora_B)]

    def half_square():
        g = torch.autograd.grad(mean_loss(m, batches), pairs)
        return sum((x**2).sum() for x in g).item() / 2

    for name in ("layers.0.gate_proj", "layers.1.shortcut_ffn"):
        layer, eps, values = layers[name], 1e-5, []
        old = layer.lora_A.data.clone(), layer.lora_B.data.clone()
        for factor in (1 + eps, 1 - eps):
            layer.lora_A.data, layer.lora_B.data = old[0] * factor, old[1] * factor
            values.append(half_square())
        layer.lora_A.data, layer.lora_B.data = old
        assert scores[name] == pytest.approx((values[0] - values[1]) / 2 / eps, rel=1e-5, abs=1e-8)


def test_fisher_takes_a_text_for_an_example():
    """1/2 mean over texts of sum_k (A_k . dL_n/dA_k)^2; L_n is the mean over its own tokens."""
    m, batches = problem()
    scores, names = proxies.score("fisher", m, batches), ["layers.0.gate_proj", "layers.1.k_proj"]
    factors = [lora.adapters(m)[name].lora_A for name in names]
    found = [0.0, 0.0]
    examples = [example for batch in batches for example in terms(m, batch)]
    for losses in examples:
        gradients = torch.autograd.grad(torch.stack(losses).mean(), factors, retain_graph=True)
        for i, (a, g) in enumerate(zip(factors, gradients, strict=True)):
            found[i] += sum((a[k] @ g[k]).item() ** 2 for k in range(3))
    assert len(examples) == 5
    for name, value in zip(names, found, strict=True):
        assert scores[name] == pytest.approx(value / 2 / 5, rel=1e-9)


def test_synflow_written_out():
    """One token of ones, no RMSNorm, a gate, three query heads on each key head; S = 2 dR/de.

    e scales a branch; attention is (q . k) / c times v, the constant c being q . k, the gate is
    divided by itself alike, and what feeds q, k and gate is constant.
    """
    m, batches = problem("qwen3")
    scores = proxies.score("synflow", m, batches)

    def r(changed, factor):
        x, previous = torch.ones(12, dtype=torch.float64), None
        for i, block in enumerate(m.layers):

            def lin(place, y, block=block, i=i):
                layer = getattr(block, place)
                scale = factor if f"layers.{i}.{place}" == changed else 1
                branch = layer.scaling * scale * (y @ layer.lora_A.abs().T) @ layer.lora_B.abs().T
                if place in lora.CROSS:
                    return branch
                return branch + (y if place in lora.RESIDUALS else y @ layer.base.weight.abs().T)

            sa_input = x
            q = lin("q_proj", x.detach()).view(6, 4)
            k = lin("k_proj", x.detach()).view(2, 4)[[0, 0, 0, 1, 1, 1]]
            v = lin("v_proj", x).view(2, 4)[[0, 0, 0, 1, 1, 1]]
            dot = (q * k).sum(1, keepdim=True)
            h = lin("out_proj", (dot / dot.detach() * v).flatten())
            x = lin("residual_1", sa_input) + h
            if i:
                x = x + lin("shortcut_ffn", previous)
            previous, gate = x, lin("gate_proj", x.detach())
            h = gate / gate.detach() * lin("fc1", x)
            x = lin("residual_2", x) + lin("fc2", h) + lin("shortcut_sa", sa_input)
        return x.sum()

    for name in scores:
        factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(r(name, factor), factor)
        assert scores[name] == pytest.approx(2 * slope.item(), rel=1e-9), name


def test_synflow_as_released_is_of_the_loss():
    """|parameters|, ones for the word embeddings, the first batch's labels; the head is untied."""
    m, batches = problem("mistral")
    twin = copy.deepcopy(m)
    for p in twin.parameters():
        p.data.abs_()
    twin.word_embeddings.weight.data.fill_(1)
    scores, layers = proxies.score("synflow_released", m, batches), lora.adapters(twin)
    factors = [p for a in layers.values() for p in (a.lora_A, a.lora_B)]
    gradients = torch.autograd.grad(mean_loss(twin, batches[:1]), factors)
    parts = [(p * g).abs().sum().item() for p, g in zip(factors, gradients, strict=True)]
    expected = {n: parts[2 * i] + parts[2 * i + 1] for i, n in enumerate(layers)}
    assert scores == pytest.approx(expected, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("proxy", proxies.PROXIES)
def test_at_b_zero_on_a_language_model(proxy):
    """What lives and what is exactly zero; alpha_test has no accuracy here, and says so."""
    m, batches = problem()
    for layer in lora.adapters(m).values():
        layer.lora_B.data.zero_()
    if proxy.startswith("alpha_test"):
        with pytest.raises(ValueError, match="alpha_test needs accuracy: a classification task"):
            proxies.score(proxy, m, batches)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = proxies.score(proxy, m, batches).values()
    dead = proxy in ("snip", "synflow", "synflow_released", "fisher")
    if proxy == "snip_slot":  # the cross-layer shortcuts' matrix is zero
        assert sum(v > 0 for v in values) == 21 - 3 and not said
        return
    assert (not any(values)) == dead and bool(said) == dead
    assert dead or all(v > 0 for v in values)


# ------------------------------------------------------------------------------- training, choosing


def train(m, steps, before=lambda step: None, delta=None):
    """The loop, spelt out, with AdamW; every step has a batch of its own."""
    optimizer = torch.optim.AdamW(lora.trainable(m).values(), lr=0.02, weight_decay=0.1)
    for step in range(steps):
        before(step)
        m(**batch_of(m, step)).loss.backward()
        if delta:
            delta.before_step()
        optimizer.step()
        if delta:
            delta.after_step()
        optimizer.zero_grad()


def test_no_gradient_below_the_first_module_that_is_on():
    """The graph begins at it: what comes out of the block before is a constant."""
    m, (batch, _) = problem()
    lora.switch(m, {"layers.1.gate_proj", "layers.1.shortcut_ffn"})
    with_graph = []
    for block in m.layers:
        block.register_forward_hook(
            lambda _block, _x, out: with_graph.append([h.requires_grad for h in out])
        )
    m(**batch).loss.backward()
    assert with_graph == [[False, False], [True, True]]  # the stream, the FFN's input
    assert lora.adapters(m)["layers.1.gate_proj"].lora_A.grad is not None


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("budget", [None, 700])
def test_allocation_while_training(mode, budget):
    """Three decisions in six steps, or one; the best are on, and what is off does not move."""
    m, batches = problem()
    m.train()
    layers = lora.adapters(m)
    costs = {n: 3 * (a.in_features + a.out_features) for n, a in layers.items()}
    plan = allocate.Reallocator(costs, mode=mode, keep=0.4, budget=budget, every=0.5)
    seen = []

    def before(step):
        if step:
            for name, layer in layers.items():
                moved = not torch.equal(layer.lora_B, seen[-1][name])
                assert moved == layer.enabled, (step, name)
        if plan.due(step, step % 4, 4):
            scores = proxies.score("grad_norm", m, batches)
            on = plan.choose(scores, step, step // 4)
            lora.switch(m, on)
            off = set(scores) - on
            if budget is None:  # floor(0.4 * 14) linear layers + round(0.4 * 7) shortcuts
                assert len(on) == 5 + 3
                assert min(scores[n] for n in on) > max(scores[n] for n in off)
            else:
                spent = sum(costs[n] for n in on)
                assert spent <= 700 < spent + min(costs[n] for n in off)
        seen.append({n: a.lora_B.detach().clone() for n, a in layers.items()})

    train(m, 6, before)
    assert [d["step"] for d in plan.history] == ([0] if mode == "static" else [0, 2, 4])
    assert any("gate_proj" in name for name in costs)


def test_delta_lora_telescopes_on_every_place():
    """W_T - W_0 = lambda s (P_T - P_{K + 1}), gate_proj too; and the export is what was trained."""
    m = tiny.model("llama", head="lm", num_layers=2)
    lora.inject(m, lora.LINEARS, r=2, lora_alpha=5)
    lora.mark_trainable(m)
    layers, products = lora.adapters(m), []
    w0 = {n: a.base.weight.detach().clone() for n, a in layers.items()}
    delta = DeltaLoRA(m, 0.6, 3)

    def before(_):
        products.append({n: (a.lora_B @ a.lora_A).detach() for n, a in layers.items()})

    train(m, 9, before, delta)
    before(None)
    assert len(w0) == 14
    for name, layer in layers.items():
        moved = 0.6 * 2.5 * (products[-1][name] - products[4][name])
        assert moved.abs().max() > 1e-4
        w = layer.base.weight.detach()
        torch.testing.assert_close(w - w0[name], moved, rtol=0, atol=1e-14)
        A, B = delta.export()[name]
        assert A.shape[0] == 4
        torch.testing.assert_close(B @ A, moved + 2.5 * products[-1][name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_merged_with_a_gate_and_back(family):
    """Every place; equal logits, the shortcuts as branches still, and the bits come back."""
    m = tiny.adapted(family, shortcuts=ALL, head="lm").eval()
    lora.adapters(m)["layers.1.gate_proj"].enabled = False
    batch, before = tiny.batch(m.config), {n: p.clone() for n, p in m.named_parameters()}
    expected = m(**batch).logits
    merged = lora.merge(m)
    assert "layers.0.gate_proj" in merged and "layers.1.gate_proj" not in merged
    assert len(merged) == 20
    torch.testing.assert_close(m(**batch).logits, expected, rtol=0, atol=1e-12)
    lora.unmerge(m)
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())


# ---------------------------------------------------------------------------------------- relatives


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("name", METHODS["adapter"])
def test_a_relative_on_a_language_model(name):
    """delta_w is what forward adds, by dense.py on plain weights; or the reason why not.

    On every place of two blocks with a gate. CondLoRA needs square weights and CoRA q, k and v of
    one size: by name on LLaMA's grouped heads, and in a model where they are so they work.
    """
    adapter, targets = METHODS["adapter"][name], lora.LINEARS
    m = tiny.model("llama", head="lm", num_layers=2).eval()
    if name.startswith(("condlora", "cora")):
        targets, message = QKV, "needs (square weights|q, k and v of one size)"
        with pytest.raises(ValueError, match=message):
            lora.inject(m, targets, r=4, lora_alpha=5, adapter=adapter)
        assert not lora.adapters(m)
        sizes = {"num_heads": 3, "num_kv_heads": 3}
        m = tiny.model("llama", head="lm", num_layers=2, **sizes).eval()
    plain, batch = copy.deepcopy(m), batch_of(m)
    lora.inject(m, targets, r=4, lora_alpha=5, adapter=adapter)
    layers = lora.adapters(m)
    assert len(layers) == 2 * len(targets)
    tiny.randomise([f for a in layers.values() for f in a.factors().values()], 2)
    got = m(**batch).logits
    if layers["layers.1.q_proj"].unmergeable:
        with pytest.raises(ValueError, match="cannot be merged: "):
            lora.merge(m)
        return
    with torch.no_grad():
        for place, layer in layers.items():
            assert layer.delta_w().abs().max() > 1e-3
            plain.get_submodule(place).weight += layer.delta_w()
    for row, n, expected in zip(got, (9, 4, 6), dense.logits(plain, batch), strict=True):
        torch.testing.assert_close(row[:n], expected, rtol=0, atol=1e-10)
    lora.merge(m)
    torch.testing.assert_close(m(**batch).logits, got, rtol=0, atol=1e-11)
