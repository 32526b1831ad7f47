"""proxies.py against closed forms and finite differences; that nothing is left behind."""

import copy
import warnings

import pytest
import torch

import lora
import proxies
import tiny
from relatives import rank_scores

ALL = lora.SHORTCUTS["all"]
GRADIENT_PROXIES = ("grad_norm", "snip", "grasp", "fisher", "grad_norm_slot", "snip_slot")


def problem(family="bert", shortcuts=ALL, n=2, zero_b=False):
    """A model with every kind of module at a generic point (or at B = 0), and batches."""
    m = tiny.adapted(family, targets=("q_proj", "v_proj", "fc2"), shortcuts=shortcuts)
    if zero_b:
        for layer in lora.adapters(m).values():
            layer.lora_B.data.zero_()
    return m, [tiny.batch(m.config, seed=i) for i in range(n)]


def mean_loss(m, batches):
    """The mean over all examples, each alone."""
    losses = []
    for batch in batches:
        for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
            example = {
                k: v[i : i + 1] if k == "labels" else v[i : i + 1, :n] for k, v in batch.items()
            }
            losses.append(m(**example).loss)
    return torch.stack(losses).mean()


def numeric(m, batches, parameter, eps=1e-6):
    """Central differences of the mean loss, entry by entry."""
    result = torch.zeros_like(parameter)
    flat, out = parameter.data.view(-1), result.view(-1)
    with torch.no_grad():
        for i in range(len(flat)):
            old = flat[i].item()
            flat[i] = old + eps
            up = mean_loss(m, batches)
            flat[i] = old - eps
            out[i] = (up - mean_loss(m, batches)) / (2 * eps)
            flat[i] = old
    return result


SOME = ("layers.1.v_proj", "layers.2.residual_1", "layers.1.shortcut_ffn")


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_grad_norm_and_snip_by_finite_differences(family):
    m, batches = problem(family, n=1)
    norms, snips = (proxies.score(p, m, batches) for p in ("grad_norm", "snip"))
    for name in SOME[:2] if family == "bert" else SOME[2:]:
        layer = lora.adapters(m)[name]
        a, b = numeric(m, batches, layer.lora_A), numeric(m, batches, layer.lora_B)
        expected = a.square().sum().sqrt() + b.square().sum().sqrt()
        assert norms[name] == pytest.approx(expected.item(), rel=1e-6)
        expected = sum(
            (p.detach() * g).abs().sum() for p, g in ((layer.lora_A, a), (layer.lora_B, b))
        )
        assert snips[name] == pytest.approx(expected.item(), rel=1e-6)


def dense_gradients(m, batches):
    """{name: dL/dW} of the dense matrix in each place, by autograd through a matrix added to it.

    Finite differences would need one loss for each entry of each matrix.
    """
    layers, probes, hooks = lora.adapters(m), {}, []
    for name, layer in layers.items():
        probe = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        probes[name] = probe.requires_grad_(True)
        hook = layer.register_forward_hook(
            lambda _m, x, h, p=probes[name]: h + torch.einsum("oi,bti->bto", p, x[0])
        )
        hooks.append(hook)
    gradients = torch.autograd.grad(mean_loss(m, batches), list(probes.values()))
    for hook in hooks:
        hook.remove()
    return dict(zip(probes, gradients, strict=True))


def test_slot_scores_are_those_of_the_dense_matrix():
    """G = dL/dW of W, of the identity and of zero; and dL/dB = s G A^T, dL/dA = s B^T G."""
    m, batches = problem()
    g = dense_gradients(m, batches)
    norms, snips = (proxies.score(p, m, batches) for p in ("grad_norm_slot", "snip_slot"))
    found = proxies.factor_gradients(m, batches)
    pairs = {name: (a, b) for name, ((_, a), (_, b)) in found.items()}
    for name, layer in lora.adapters(m).items():
        place = name.rpartition(".")[2]
        assert norms[name] == pytest.approx(g[name].square().sum().sqrt().item(), rel=1e-9)
        w = (
            layer.base.weight
            if place in lora.LINEARS
            else torch.eye(12) * (place in lora.RESIDUALS)
        )
        assert snips[name] == pytest.approx((w * g[name]).abs().sum().item(), rel=1e-9, abs=1e-12)
        s = layer.lora_alpha / layer.r
        da, db = pairs[name]
        torch.testing.assert_close(db, s * g[name] @ layer.lora_A.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(da, s * layer.lora_B.T @ g[name], rtol=0, atol=1e-12)


def test_slot_scores_do_not_depend_on_a_alpha_or_r():
    first, batches = problem(zero_b=True)
    second = tiny.model("bert")
    lora.inject(second, ("q_proj", "v_proj", "fc2"), r=5, lora_alpha=99, shortcuts=ALL, seed=8)
    for proxy in ("grad_norm_slot", "snip_slot"):
        a, b = (proxies.score(proxy, m, batches) for m in (first, second))
        assert a == pytest.approx(b, rel=1e-9)
    assert proxies.score("snip_slot", first, batches)["layers.1.shortcut_sa"] == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("proxy", ["snip", "synflow", "synflow_released", "fisher", "alpha_test"])
def test_exactly_zero_at_b_zero_and_said(family, proxy):
    m, batches = problem(family, zero_b=True)
    with pytest.warns(
        UserWarning, match=f"all {proxy} scores are zero.*choice is random.*grad_norm"
    ) as said:
        scores = proxies.score(proxy, m, batches)
    assert set(scores.values()) == {0.0}
    assert said[0].filename == __file__  # the line of the caller is shown


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_lives_at_b_zero(family):
    """grad_norm = ||dL/dB||, grasp = ||dL/dB||^2 (zero-cost-nas: minus that), the slots."""
    m, batches = problem(family, zero_b=True)
    g = dense_gradients(m, batches)
    norms, hessian = (proxies.score(p, m, batches) for p in ("grad_norm", "grasp"))
    for name, layer in lora.adapters(m).items():
        db = layer.scaling * (g[name] @ layer.lora_A.detach().T)
        assert norms[name] == pytest.approx(db.norm().item(), rel=1e-9)
        assert hessian[name] == pytest.approx(db.norm().item() ** 2, rel=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for proxy in ("grad_norm_slot", "snip_slot", "constant"):
            proxies.score(proxy, m, batches)


def test_grad_norm_at_b_zero_estimates_the_slot():
    """E ||dL/dB||^2 over draws of A = s^2 r / (3 in) ||G||^2."""
    m, batches = problem(zero_b=True, shortcuts=())
    slot = proxies.score("grad_norm_slot", m, batches)
    layers = lora.adapters(m)
    squares = dict.fromkeys(layers, 0.0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        for layer in layers.values():
            uniform = torch.rand(layer.lora_A.shape, generator=rng, dtype=torch.float64)
            layer.lora_A.data = (2 * uniform - 1) * layer.in_features**-0.5
        for name, value in proxies.score("grad_norm", m, batches[:1]).items():
            squares[name] += value**2 / 200
    slot = proxies.score("grad_norm_slot", m, batches[:1])
    for name, layer in layers.items():
        expected = layer.scaling**2 * layer.r / (3 * layer.in_features) * slot[name] ** 2
        assert squares[name] == pytest.approx(expected, rel=0.25)


def test_grasp_is_the_change_of_the_gradient_norm():
    """theta . H g by differences: d/de 1/2 ||g(theta_m (1 + e))||^2 over all pairs."""
    m, batches = problem(n=1)
    scores, eps = proxies.score("grasp", m, batches), 1e-5

    def half_square():
        pairs = [p for a in lora.adapters(m).values() for p in (a.lora_A, a.lora_B)]
        g = torch.autograd.grad(mean_loss(m, batches), pairs)
        return sum(x.square().sum() for x in g).item() / 2

    for name in SOME:
        layer = lora.adapters(m)[name]
        old = copy.deepcopy((layer.lora_A.data, layer.lora_B.data))
        values = []
        for factor in (1 + eps, 1 - eps):
            layer.lora_A.data, layer.lora_B.data = old[0] * factor, old[1] * factor
            values.append(half_square())
        layer.lora_A.data, layer.lora_B.data = old
        assert scores[name] == pytest.approx(
            (values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-8
        )


def test_fisher_by_removing_channels():
    """Example by example: scale channel k of A by 1 - e and watch that example's loss."""
    m, batches = problem()
    scores, eps = proxies.score("fisher", m, batches), 1e-6
    for name in SOME:
        layer, terms = lora.adapters(m)[name], []
        for batch in batches:
            for i in range(3):
                example = {k: v[i : i + 1] for k, v in batch.items()}
                for k in range(layer.r):
                    old, losses = layer.lora_A.data[k].clone(), []
                    for factor in (1 + eps, 1 - eps):
                        layer.lora_A.data[k] = old * factor
                        losses.append(m(**example).loss.item())
                    layer.lora_A.data[k] = old
                    terms.append(((losses[0] - losses[1]) / (2 * eps)) ** 2)
        assert scores[name] == pytest.approx(sum(terms) / 2 / 6, rel=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_synflow_conserves_and_reaches_everything(family, monkeypatch):
    """S(A) = S(B) for every pair, and no module of a generic model scores zero, q_proj included."""
    m, batches = problem(family)
    parts = {}
    original = proxies.by_module

    def spy(layers, values):
        parts.update(original(layers, values))
        return original(layers, values)

    monkeypatch.setattr(proxies, "by_module", spy)
    scores = proxies.score("synflow", m, batches)
    for name, (a, b) in parts.items():
        assert a == pytest.approx(b, rel=1e-9) and a > 0
        assert scores[name] == pytest.approx(2 * b, rel=1e-9)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_synflow_is_twice_what_the_flow_loses_without_the_pair(family, monkeypatch):
    """In a net of 12 blocks: R falls by S / 2 when the branch is cut, and no S / 2 is above R.

    Not of q, k and the gate: they weigh a flow, and a share of its weight is theirs.
    """
    m, kept = tiny.adapted(family, shortcuts=ALL, num_layers=12), []
    scores = proxies.synflow(m, [])
    monkeypatch.setattr(proxies, "flow", lambda net, r: kept.append((net, r)))
    proxies.synflow(m, [])
    [(net, r)] = kept
    whole = r(net).item()
    for name, layer in lora.adapters(net).items():
        assert 0 < scores[name] / 2 <= whole * (1 + 1e-9), name
        if name.endswith(("q_proj", "k_proj", "gate_proj")):
            continue
        old = layer.lora_B.data
        layer.lora_B.data = 0 * old
        assert whole - r(net).item() == pytest.approx(scores[name] / 2, rel=1e-6), name
        layer.lora_B.data = old


@pytest.mark.parametrize("place", ["gate_proj", "q_proj", "k_proj"])
def test_synflow_where_a_feature_or_a_head_is_zero(place):
    """What weighs by 0 lets nothing through; the other paths are those of a net without it."""
    m = tiny.adapted("llama", targets=("v_proj", "out_proj", "fc1", "fc2"))
    with torch.no_grad():
        getattr(m.layers[1], place).weight[:4] = 0  # of k the first of two heads
    scores, onward = proxies.synflow(m, []), "fc2" if place == "gate_proj" else "out_proj"
    heads = {"gate_proj": 4, "q_proj": 4, "k_proj": 12}[place]  # three heads of q on one of k
    onward = getattr(m.layers[1], onward)
    with torch.no_grad():
        onward.base.weight[:, :heads] = 0  # the features of the next matrix that stay 0
        onward.lora_A[:, :heads] = 0
        getattr(m.layers[1], place).weight[:4] = 1
    assert scores == pytest.approx(proxies.synflow(m, []), rel=1e-9)
    assert all(0 < s < float("inf") for s in scores.values())


def test_synflow_calls_every_layer_once(monkeypatch):
    """A module that hands on what it was given (relatives/reslora.py) would hand it on twice."""
    m, kept, calls = tiny.adapted("qwen3"), [], []
    monkeypatch.setattr(proxies, "flow", lambda net, r: kept.append((net, r)))
    proxies.synflow(m, [])
    [(net, r)] = kept
    for name, layer in lora.adapters(net).items():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    r(net)
    assert sorted(calls) == sorted(lora.adapters(m))


def test_synflow_of_a_deep_net_stays_in_range():
    """q . k of two streams that are each 1e160 is not a number; their shares are."""
    m = tiny.adapted("llama", num_layers=2)
    for p in m.parameters():
        p.data *= 1e16
    scores = proxies.synflow(m, [])
    assert all(0 < s < float("inf") for s in scores.values()) and max(scores.values()) > 1e200


def test_synflow_by_finite_differences():
    """R written out for one token of ones, without LayerNorm; S = 2 dR/de, e scaling the branch.

    Attention is (q . k) / c times v, the constant c being q . k before anything is scaled; q and k
    see the residual stream as it was then.
    """
    m, batches = problem("opt", shortcuts=ALL)
    scores, eps = proxies.score("synflow", m, batches), 1e-6

    constants = {}

    def r(changed, factor):
        x, previous = torch.ones(12, dtype=torch.float64), None
        for i, block in enumerate(m.layers):

            def lin(place, y, block=block, i=i):
                layer = getattr(block, place)
                if not isinstance(layer, lora.LoRALayer):
                    return y @ layer.weight.abs().T + layer.bias.abs()
                scale = factor if f"layers.{i}.{place}" == changed else 1
                branch = layer.scaling * scale * (y @ layer.lora_A.abs().T) @ layer.lora_B.abs().T
                if place in lora.RESIDUALS:
                    return y + branch
                if place in lora.CROSS:
                    return branch
                return y @ layer.base.weight.abs().T + layer.base.bias.abs() + branch

            sa_input = x
            seen = constants.setdefault(("x", i), x)
            q, k = (lin(place, seen).view(3, 4) for place in ("q_proj", "k_proj"))
            dot = (q * k).sum(1, keepdim=True)  # one number per head
            v = lin("v_proj", x).view(3, 4)
            h = lin("out_proj", (dot / constants.setdefault(i, dot) * v).flatten())
            x = lin("residual_1", sa_input) + h
            if i:
                x = x + lin("shortcut_ffn", previous)
            previous = x
            x = lin("residual_2", x) + lin("fc2", lin("fc1", x))
            x = x + lin("shortcut_sa", sa_input)
        return x.sum().item()

    r(None, 1)
    for name in ("layers.0.v_proj", "layers.0.q_proj", "layers.1.fc2", *SOME):
        derivative = (r(name, 1 + eps) - r(name, 1 - eps)) / (2 * eps)
        assert scores[name] == pytest.approx(2 * derivative, rel=1e-5)


def test_synflow_released_uses_labels_and_the_real_layer_norm():
    """By finite differences on a copy with |parameters|, ones in place of word embeddings."""
    m, batches = problem("opt")
    scores, eps = proxies.score("synflow_released", m, batches), 1e-6
    twin = copy.deepcopy(m)
    for p in twin.parameters():
        p.data.abs_()
    batch = {k: v for k, v in batches[0].items() if k != "input_ids"}
    ones = torch.ones(3, 9, 12, dtype=torch.float64)
    for name in SOME:
        layer, total = lora.adapters(twin)[name], 0.0
        for p in (layer.lora_A, layer.lora_B):
            flat = p.data.view(-1)
            for i in range(len(flat)):
                old, values = flat[i].item(), []
                for sign in (1, -1):
                    flat[i] = old + sign * eps
                    values.append(twin(None, inputs_embeds=ones, **batch).loss.item())
                flat[i] = old
                total += abs(old * (values[0] - values[1]) / (2 * eps))
        assert scores[name] == pytest.approx(total, rel=1e-4, abs=1e-9)


def test_binary_search_finds_the_smallest_alpha():
    for answer in range(11):
        tried = []

        def measure(a, answer=answer, tried=tried):
            tried.append(a)
            return 1.0 if a >= answer / 10 else 0.0

        assert proxies.smallest_alpha(measure, 1.0) == answer
        assert len(tried) <= 4 and max(tried) < 1  # at 1 it is the model itself


def test_as_released_the_whole_layer_is_scaled(monkeypatch):
    monkeypatch.setattr(proxies, "alpha_test", lambda *_, whole_layer=False: whole_layer)
    assert proxies.alpha_test_released(None, None) is True


@pytest.mark.parametrize("whole", [False, True])
def test_alpha_scales_the_branch_or_as_released_the_layer(whole, monkeypatch):
    """The accuracy at each alpha is that of a copy whose branch, or layer, is scaled by hand."""
    m = tiny.adapted("opt-350m", targets=("v_proj",), shortcuts=("residual_1", "shortcut_ffn"))
    batches, curves = [tiny.batch(m.config, seed=i) for i in range(3)], []
    with torch.no_grad():
        for layer in lora.adapters(m).values():
            layer.lora_B *= 2
        for batch in batches:  # what the model says now, so that taking a branch away hurts
            batch["labels"] = m(**batch).logits.argmax(-1)
    alphas = [i / 10 for i in range(11)]

    def record(measure, least):
        curves.append([measure(a) for a in alphas])
        return 0.0

    monkeypatch.setattr(proxies, "smallest_alpha", record)
    proxies.alpha_test(m, batches, whole_layer=whole)
    varied = 0
    for curve, (name, layer) in zip(curves, lora.adapters(m).items(), strict=True):
        for a, got in zip(alphas, curve, strict=True):
            twin = copy.deepcopy(m)
            other = lora.adapters(twin)[name]
            if whole and isinstance(layer.base, torch.nn.Linear):
                for p in (other.base.weight, other.base.bias, other.lora_B):
                    p.data *= a
            else:
                other.lora_B.data *= a
            right = [twin(**x).logits.argmax(-1) == x["labels"] for x in batches]
            assert got == torch.cat(right).double().mean().item()
        varied += len(set(curve)) > 1
    assert varied >= 2


def test_alpha_test_keeps_99_percent_of_accuracy(monkeypatch):
    m, batches = problem()
    thresholds = []
    monkeypatch.setattr(proxies, "smallest_alpha", lambda _, least: thresholds.append(least) or 3.0)
    assert set(proxies.score("alpha_test", m, batches).values()) == {3.0}
    right = [m(**x).logits.argmax(-1) == x["labels"] for x in batches]
    expected = 0.99 * torch.cat(right).double().mean().item()
    assert thresholds == pytest.approx([expected] * len(lora.adapters(m)))
    m = tiny.adapted("bert", num_labels=1)
    with pytest.raises(ValueError, match="needs accuracy"):
        proxies.score("alpha_test", m, [tiny.batch(m.config)])


def test_constant():
    m, batches = problem()
    assert set(proxies.score("constant", m, batches).values()) == {1.0}


# --------------------------------------------------------------------------------------- invariance


HEADS_OF_PROXIES = [
    (proxy, head)
    for proxy in GRADIENT_PROXIES
    for head in ("classification", "lm")
    # fisher's examples are sequences there, whose own loss is a mean over their tokens
    if (proxy, head) != ("fisher", "lm")
]


@pytest.mark.parametrize(("proxy", "head"), HEADS_OF_PROXIES)
def test_scores_do_not_depend_on_batches_or_order(proxy, head):
    m = tiny.adapted("gpt2", targets=("k_proj", "fc1"), shortcuts=ALL, head=head)
    lengths = (9, 4, 6, 5, 7)
    whole = tiny.batch(m.config, lengths=lengths)

    def part(indices):
        t = max(lengths[i] for i in indices)
        return {k: v[indices] if v.ndim == 1 else v[indices, :t] for k, v in whole.items()}

    expected = proxies.score(proxy, m, [whole])
    for cuts in ([[0, 1], [2, 3, 4]], [[4], [2, 0], [3], [1]]):
        got = proxies.score(proxy, m, [part(c) for c in cuts])
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)


def snapshot(m):
    """Everything that scoring could leave behind."""
    return {
        "parameters": {n: p.detach().clone() for n, p in m.named_parameters()},
        "ids": {n: id(p) for n, p in m.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in m.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in m.named_parameters()},
        "training": {n: x.training for n, x in m.named_modules()},
        "modules": {n: id(x) for n, x in m.named_modules()},
        "hooks": {n: len(x._forward_hooks) for n, x in m.named_modules()},
        "enabled": {n: a.enabled for n, a in lora.adapters(m).items()},
        "scaling": {n: a.scaling for n, a in lora.adapters(m).items()},
        "rng": torch.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.filterwarnings("ignore:all alpha_test")
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("proxy", proxies.PROXIES)
def test_nothing_is_left_behind(proxy, raises, monkeypatch):
    """Half of the modules off, mixed modes, gradients, dropout; also when the loss raises."""
    m = tiny.adapted("bert", shortcuts=ALL, dropout=0.1)
    batches = [tiny.batch(m.config, seed=i) for i in range(2)]
    m(**batches[0]).loss.backward()
    for i, layer in enumerate(lora.adapters(m).values()):
        layer.enabled = i % 2 == 0
    m.train()
    m.layers[1].eval()
    lora.adapters(m)["layers.0.q_proj"].lora_A.requires_grad_(False)
    before, calls = snapshot(m), []
    if raises:
        original = type(m).predict

        def predict(self, h):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of luck")
            return original(self, h)

        monkeypatch.setattr(type(m), "predict", predict)
    if raises and proxy not in (
        "constant",
        "synflow",
        "synflow_released",
    ):  # which call it once or never
        with pytest.raises(RuntimeError, match="out of luck"):
            proxies.score(proxy, m, batches)
    else:
        proxies.score(proxy, m, batches)
    after = snapshot(m)
    for part in before:
        assert same(before[part], after[part]), part


def test_modules_that_are_off_are_scored_as_if_on():
    m, batches = problem()
    expected = proxies.score("grad_norm", m, batches)
    for layer in list(lora.adapters(m).values())[::2]:
        layer.enabled = False
    assert proxies.score("grad_norm", m, batches) == expected


# ---------------------------------------------------------------------------------- ranks, refusals


def test_rank_scores_are_those_of_the_rows_and_columns():
    m, batches = problem()
    ranks = rank_scores.score_ranks("snip", m, batches)
    whole = proxies.score("snip", m, batches)
    assert {n: sum(r) for n, r in ranks.items()} == pytest.approx(whole, rel=1e-12)
    norms = rank_scores.score_ranks("grad_norm", m, batches)
    for name in SOME[:1]:
        layer = lora.adapters(m)[name]
        a, b = numeric(m, batches, layer.lora_A), numeric(m, batches, layer.lora_B)
        for k in range(3):
            expected = (a[k] ** 2).sum() ** 0.5 + (b[:, k] ** 2).sum() ** 0.5
            assert norms[name][k] == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="does not tell ranks apart, allowed: grad_norm, snip"):
        rank_scores.score_ranks("constant", m, batches)


def test_refusals():
    m, batches = problem()
    with pytest.raises(ValueError, match="unknown proxy 'gradnorm', allowed: constant, grad_norm"):
        proxies.score("gradnorm", m, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        proxies.score("grad_norm", m, [])
    with pytest.raises(ValueError, match="needs a model with LoRA modules"):
        proxies.score("grad_norm", tiny.model("bert"), batches)
    lora.adapters(m)["layers.1.fc2"].lora_A.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the grad_norm score of layers\.\d\.\w+ is nan"):
        proxies.score("grad_norm", m, batches)
    m, batches = problem()
    lora.merge(m)
    with pytest.raises(ValueError, match="not merged"):
        proxies.score("grad_norm", m, batches)
