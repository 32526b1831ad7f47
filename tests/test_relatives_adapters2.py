"""Relatives whose modules share something: Tied-LoRA, CondLoRA, CoRA, ResLoRA.

Each against its defining formula in dense matrices, in float64 at a generic point: every factor is
random, alpha is not r, examples differ in length.
"""

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import lora
import proxies
import tiny
import train
from delta_lora import DeltaLoRA
from relatives import METHODS
from relatives.incompatible import INCOMPATIBLE
from support.flags import equal_budget_control, parse_flags
from test_train import whole_and_interrupted
from tools.peft import writing

ADAPTERS = METHODS["adapter"]
LINEAR = ("tied", "condlora", "cora", "cora_trained", "reslora_block")
KINDS = (*LINEAR, "reslora_input", "reslora_middle")
QKV = ("q_proj", "k_proj", "v_proj")
S = 5 / 3  # alpha / r


def inject(kind, family="bert", targets=QKV, shortcuts=(), **overrides):
    """(model as it starts, its modules)."""
    m = tiny.model(family, **overrides)
    lora.inject(m, targets, r=3, lora_alpha=5, adapter=ADAPTERS[kind], shortcuts=shortcuts)
    lora.mark_trainable(m)
    return m, lora.adapters(m)


def generic(kind, family="bert", **more):
    """The same, with every factor random."""
    m, layers = inject(kind, family, **more)
    tiny.randomise([p for n, p in lora.trainable(m).items() if ".lora_" in n], seed=8, std=0.5)
    return m, layers


def place_of(name):
    return name.rpartition(".")[2]


def earlier(name, pre=4):
    """Names of the same place in the blocks before, the nearest first."""
    _, n, place = name.split(".")
    return [f"layers.{k}.{place}" for k in range(int(n) - 1, max(-1, int(n) - 1 - pre), -1)]


def delta(kind, layers, name):
    """ΔW of a module by its definition; what is off contributes nothing."""
    a = layers[name]
    if not a.enabled:
        return torch.zeros(a.out_features, a.in_features).double()
    if kind == "tied":
        return S * torch.einsum("i,ik,k,kj->ij", a.lora_v, a.lora_B, a.lora_u, a.lora_A)
    if kind == "condlora":
        W = a.base.weight
        return S * torch.einsum("ia,ak,kb,jb->ij", W, a.lora_B, a.lora_A, W)
    own = [name, *(earlier(name) if kind == "reslora_block" else [])]
    parts = [layers[n] for n in own if layers[n].enabled]
    return S * sum(torch.einsum("ik,kj->ij", p.lora_B, p.lora_A) for p in parts)


def dense_logits(kind, family, layers, batch, **overrides):
    """Logits of the model without adapters, whose weights are W + ΔW."""
    m = tiny.model(family, **overrides)
    with torch.no_grad():
        for name in layers:
            m.get_submodule(name).weight += delta(kind, layers, name)
        return m(**batch).logits


def hooked_logits(kind, family, layers, batch):
    """reslora_input, reslora_middle: what hooks on the frozen layers add to their outputs.

    The plain model computes its last block at one position of each example; what comes from the
    block before is picked there.
    """
    m, seen = tiny.model(family), {}
    lengths = batch["attention_mask"].sum(1)
    read = lengths - 1 if m.config.causal else 0 * lengths

    def at(x, like):
        return (
            x
            if x.shape == like.shape
            else torch.stack([x[i, read[i]] for i in range(len(x))])[:, None]
        )

    def add(name):
        def hook(_module, inputs, output):
            [x] = inputs
            seen[name] = x
            a = layers[name]
            if not a.enabled:
                return output
            if kind == "reslora_input":
                total = x + sum(at(seen[n], x) for n in earlier(name)[:1])
                thin = torch.einsum("kj,btj->btk", a.lora_A, total)
            else:
                chain = [name, *(n for n in earlier(name) if layers[n].enabled)]
                parts = [(layers[n].lora_A, at(seen[n], x)) for n in chain]
                thin = sum(torch.einsum("kj,btj->btk", A, h) for A, h in parts)
            return output + S * torch.einsum("ik,btk->bti", a.lora_B, thin)

        return hook

    for name in layers:
        m.get_submodule(name).register_forward_hook(add(name))
    with torch.no_grad():
        return m(**batch).logits


def expected_logits(kind, family, layers, batch):
    by = dense_logits if kind in LINEAR else hooked_logits
    return by(kind, family, layers, batch)


def close(a, b, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_pretrained_model(kind):
    m, _ = inject(kind)
    batch = tiny.batch(m.config)
    close(m(**batch).logits, tiny.model("bert")(**batch).logits, atol=1e-13)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_definition(kind, family):
    m, layers = generic(kind, family)
    batch = tiny.batch(m.config)
    got = m(**batch).logits
    close(got, expected_logits(kind, family, layers, batch))
    assert (got - tiny.model(family)(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["tied", "reslora_block", "reslora_input", "reslora_middle"])
def test_every_place_can_be_adapted(kind):
    """fc1 and fc2 are not square; the last block reads one position of most places."""
    m, layers = generic(kind, "opt", targets=lora.LINEARS)
    batch = tiny.batch(m.config)
    close(m(**batch).logits, expected_logits(kind, "opt", layers, batch))


@pytest.mark.parametrize("kind", LINEAR)
def test_merge_is_exact_and_unmerge_gives_the_bits(kind):
    m, layers = generic(kind)
    batch, before = tiny.batch(m.config), {n: a.base.weight.clone() for n, a in layers.items()}
    logits, expected = m(**batch).logits, {n: delta(kind, layers, n) for n in layers}
    lora.merge(m)
    for name, layer in layers.items():
        close(layer.base.weight, before[name] + expected[name], atol=1e-13)
        close(layer.delta_w(), expected[name], atol=1e-13)  # of the weight as it was
    close(m(**batch).logits, logits)
    lora.unmerge(m)
    assert all(torch.equal(a.base.weight, before[n]) for n, a in layers.items())


@pytest.mark.parametrize("kind", ["reslora_input", "reslora_middle"])
def test_what_is_no_matrix_is_not_merged(kind):
    m, layers = generic(kind)
    before = {n: a.base.weight.clone() for n, a in layers.items()}
    for refused in (lambda: lora.merge(m), lambda: layers["layers.1.q_proj"].pair()):
        with pytest.raises(ValueError, match=f"{kind} adds what earlier blocks received"):
            refused()
    assert all(torch.equal(a.base.weight, before[n]) and not a.merged for n, a in layers.items())
    batch = tiny.batch(m.config)
    own_pair = tiny.model("bert")
    with torch.no_grad():
        for name, a in layers.items():
            own_pair.get_submodule(name).weight += S * a.lora_B @ a.lora_A
    assert (own_pair(**batch).logits - m(**batch).logits).abs().max() > 1e-3


def test_predecessors_beyond_the_fourth_are_left_out():
    for kind in ("reslora_block", "reslora_middle"):
        _, layers = generic(kind, num_layers=6, targets=("v_proj",))
        assert [len(a.before) for a in layers.values()] == [0, 1, 2, 3, 4, 4]
        x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1)).double()
        names = list(layers)
        for name in names[:-1]:
            layers[name](x)
        last, chain = layers[names[-1]], [names[-1], *earlier(names[-1])]
        assert names[0] not in chain and len(chain) == 5
        if kind == "reslora_block":
            dW = sum(layers[n].lora_B @ layers[n].lora_A for n in chain)
        else:
            dW = last.lora_B @ sum(layers[n].lora_A for n in chain)
        close(last(x), F.linear(x, last.base.weight + S * dW, last.base.bias))


# --------------------------------------------------------------------- settings that are plain LoRA


@pytest.mark.parametrize("kind", ["tied", "reslora_input", "reslora_block", "reslora_middle"])
def test_one_block_is_lora(kind):
    """Tied: with u and v as they are at the start, ones."""
    m, layers = generic(kind, num_layers=1)
    plain, own = generic("lora", num_layers=1)
    _, start = inject(kind, num_layers=1)
    for name, a in layers.items():
        if kind == "tied":
            a.lora_u.data, a.lora_v.data = start[name].lora_u.data, start[name].lora_v.data
        a.lora_A.data, a.lora_B.data = own[name].lora_A.data, own[name].lora_B.data
    batch = tiny.batch(m.config)
    close(m(**batch).logits, plain(**batch).logits, atol=1e-13)


@pytest.mark.parametrize("kind", ["reslora_input", "reslora_block", "reslora_middle"])
def test_without_predecessors_it_is_lora(kind, monkeypatch):
    batch, plain = tiny.batch(tiny.config("bert")), generic("lora")[0]
    assert (generic(kind)[0](**batch).logits - plain(**batch).logits).abs().max() > 1e-3
    monkeypatch.setattr(ADAPTERS[kind], "pre", 0)
    close(generic(kind)[0](**batch).logits, plain(**batch).logits, atol=1e-13)


@pytest.mark.parametrize("kind", ["reslora_input", "reslora_middle"])
def test_dropout_is_on_what_a_branch_takes(kind):
    """Two modules, the second with what the first hands on: the sum written out, at one seed."""
    layers = [ADAPTERS[kind](torch.nn.Linear(12, 20), 12, 20, 3, 5, 0.5).double() for _ in "ab"]
    ADAPTERS[kind].connect({f"layers.{i}.fc1": a for i, a in enumerate(layers)}, seed=0)
    tiny.randomise([p for a in layers for p in (a.lora_A, a.lora_B)], 4)
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, 12, dtype=torch.float64, generator=rng) for _ in "ab")
    torch.manual_seed(5)
    first, second = (layer(z) for layer, z in zip(layers, (x, y), strict=True))
    torch.manual_seed(5)
    (A, B), (C, D) = ((a.lora_A, a.lora_B) for a in layers)
    if kind == "reslora_input":  # each branch drops entries of the sum of both inputs
        inner = F.dropout(x, 0.5) @ A.T, F.dropout(x + y, 0.5) @ C.T
    else:  # each module drops entries of its own input, and hands on the same
        of_x, of_y = F.dropout(x, 0.5) @ A.T, F.dropout(y, 0.5) @ C.T
        inner = of_x, of_x + of_y
    close(first, layers[0].base(x) + S * inner[0] @ B.T, atol=1e-12)
    close(second, layers[1].base(y) + S * inner[1] @ D.T, atol=1e-12)


@pytest.mark.parametrize("kind", ["reslora_input", "reslora_middle"])
def test_a_block_that_is_called_out_of_turn_is_refused(kind):
    """As by activation checkpointing: without what came before, the branch would be LoRA's."""
    m, layers = generic(kind)
    x = torch.ones(1, 2, 12, dtype=torch.float64)
    first, second = layers["layers.0.q_proj"], layers["layers.1.q_proj"]
    for calls in (second,), (first, first, second, second):
        with pytest.raises(RuntimeError, match="is called block by block, once each"):
            for layer in calls:
                layer(x)
    assert m(**tiny.batch(m.config)).logits.isfinite().all()  # block 0 begins anew


def test_what_is_off_and_frozen_hands_on_without_a_gradient():
    m = tiny.model("bert")
    kind = ADAPTERS["reslora_middle"]
    lora.inject(m, QKV, r=3, lora_alpha=5, adapter=kind, when_off="frozen")
    lora.mark_trainable(m)
    layers = lora.adapters(m)
    tiny.randomise([p for a in layers.values() for p in (a.lora_A, a.lora_B)], seed=8)
    lora.switch(m, set(layers) - {"layers.0.q_proj"})
    m(**tiny.batch(m.config)).loss.backward()
    assert layers["layers.0.q_proj"].lora_A.grad is None
    assert layers["layers.1.q_proj"].lora_A.grad.norm() > 0


# ---------------------------------------------------------------------------------------- gradients


def plain_twin(m, layers):
    """A LoRA model of which each module has a pair of its own, of the same ΔW: (loss gradients)."""
    twin = tiny.model("bert")
    lora.inject(twin, dict.fromkeys(map(place_of, layers)), r=3, lora_alpha=5)
    for name, t in lora.adapters(twin).items():
        A, B = layers[name].branch()
        t.lora_A, t.lora_B = (torch.nn.Parameter(f.detach().clone()) for f in (A, B))
    lora.mark_trainable(twin)
    twin(**tiny.batch(m.config)).loss.backward()
    return {n: (t.lora_A.grad, t.lora_B.grad) for n, t in lora.adapters(twin).items()}


def test_tied_gradients_are_sums_over_the_blocks():
    m, layers = generic("tied")
    m(**tiny.batch(m.config)).loss.backward()
    twin = plain_twin(m, layers)
    for place in QKV:
        first = layers[f"layers.0.{place}"]
        mine = {n: a for n, a in layers.items() if place_of(n) == place}
        close(first.lora_A.grad, sum(torch.diag(a.lora_u) @ twin[n][0] for n, a in mine.items()))
        close(first.lora_B.grad, sum(torch.diag(a.lora_v) @ twin[n][1] for n, a in mine.items()))
        for name, a in mine.items():
            close(a.lora_u.grad, torch.einsum("kj,kj->k", a.lora_A, twin[name][0]))
            close(a.lora_v.grad, torch.einsum("ik,ik->i", a.lora_B, twin[name][1]))


def test_condlora_gradients_are_sums_and_pass_w_by():
    m, layers = generic("condlora")
    for a in layers.values():
        a.base.weight.requires_grad_(True)
    m(**tiny.batch(m.config)).loss.backward()
    twin = plain_twin(m, layers)
    for place in QKV:
        mine = {n: a for n, a in layers.items() if place_of(n) == place}
        first = mine[f"layers.0.{place}"]
        close(first.lora_A.grad, sum(twin[n][0] @ a.base.weight for n, a in mine.items()))
        close(first.lora_B.grad, sum(a.base.weight.T @ twin[n][1] for n, a in mine.items()))
    batch = tiny.batch(m.config)
    slots = proxies.slot_gradients(m, [batch])  # dL/dW: of W as a weight, not of W in A and B
    dense = tiny.model("bert")
    with torch.no_grad():
        for name in layers:
            dense.get_submodule(name).weight += delta("condlora", layers, name)
    weights = [dense.get_submodule(n).weight for n in layers]
    gradients = torch.autograd.grad(dense(**batch).loss, weights)
    for name, expected in zip(layers, gradients, strict=True):
        close(slots[name][1], expected)
        close(layers[name].base.weight.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    m, _ = generic(kind)
    batch, own = tiny.batch(m.config), [p for n, p in lora.trainable(m).items() if ".lora_" in n]
    rng = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=rng).double() for p in own]
    gradients = torch.autograd.grad(m(**batch).loss, own)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    @torch.no_grad()
    def loss(step):
        for p, d in zip(own, directions, strict=True):
            p += step * d
        return m(**batch).loss

    high, low = loss(1e-6), loss(-2e-6)
    close(slope, (high - low) / 2e-6, atol=1e-7)
    assert slope.abs() > 1e-3


# -------------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_exact(kind):
    """W is 12 x 12, r = 3, three blocks, three places: what is shared once."""
    m, _ = inject(kind)
    pair = 3 * (12 + 12)
    total = {"tied": 3 * (pair + 3 * (3 + 12)), "condlora": 3 * pair, "cora": 9 * 3 * 12}
    counts = lora.count_trainable(m)
    head = sum(counts[module] for module in m.head)
    assert sum(counts.values()) - head == total.get(kind, 9 * pair)
    named = [p for n, p in lora.trainable(m).items() if ".lora_" in n]
    assert sum(p.numel() for p in named) == total.get(kind, 9 * pair)
    assert len({id(p) for p in named}) == len(named)
    stored = lora.count_trainable(m, stored=True)
    lora.switch(m, set())  # nothing is on, and nothing has learned
    assert sum(lora.count_trainable(m, stored=True).values()) == head
    lora.switch(m, set(lora.adapters(m)))
    assert stored == counts


@pytest.mark.parametrize("kind", ["tied", "condlora"])
def test_what_is_shared_counts_with_the_first_that_is_on(kind):
    m, layers = inject(kind, targets=("q_proj",))
    own = 15 if kind == "tied" else 0
    assert [lora.count_trainable(m)[n] for n in layers] == [72 + own, own, own]
    lora.switch(m, {"layers.1.q_proj"})
    assert lora.count_trainable(m)["layers.1.q_proj"] == 72 + own
    assert "layers.0.q_proj.lora_A" in lora.training_now(m)
    assert "layers.0.q_proj.lora_u" not in lora.training_now(m)
    lora.switch(m, set())
    assert not [n for n in lora.training_now(m) if ".lora_" in n]


@pytest.mark.parametrize("kind", KINDS)
def test_off_means_off(kind):
    """Out of the forward pass, its neighbours' too, and no step, decay or moment for its own."""
    m, layers = generic(kind)
    off = {"layers.1.q_proj", "layers.0.v_proj"}
    lora.switch(m, set(layers) - off)
    batch = tiny.batch(m.config)
    close(m(**batch).logits, expected_logits(kind, "bert", layers, batch))
    optimizer = torch.optim.AdamW(lora.trainable(m).values(), lr=0.1, weight_decay=0.3)
    own = {id(f) for n in off for f in layers[n].factors().values()}
    own -= {id(f) for n in set(layers) - off for f in layers[n].factors().values()}
    before = {n: p.detach().clone() for n, p in lora.trainable(m).items()}
    m(**batch).loss.backward()
    optimizer.step()
    for name, p in lora.trainable(m).items():
        assert torch.equal(p, before[name]) == (id(p) in own), name
        assert (p not in optimizer.state) == (id(p) in own)


@pytest.mark.parametrize("kind", ["cora", "cora_trained", "reslora_input"])
def test_off_and_frozen_stays_in_without_a_gradient(kind):
    m, layers = generic(kind)
    batch = tiny.batch(m.config)
    logits = m(**batch).logits
    for a in layers.values():
        a.when_off = "frozen"
    lora.switch(m, set(layers) - {"layers.1.q_proj"})
    close(m(**batch).logits, logits, atol=0)
    m(**batch).loss.backward()
    for name, a in layers.items():
        on = name != "layers.1.q_proj"
        assert all((f.grad is not None) == on for f in a.factors().values())


def test_cora_takes_b_from_the_common_subspace():
    """U_r spans what the r largest eigenvalues of sum W W^T belong to; A alone trains."""
    m, layers = inject("cora")
    trained = inject("cora_trained")[1]
    for i in range(3):
        three = [layers[f"layers.{i}.{place}"] for place in QKV]
        values, vectors = torch.linalg.eigh(sum(a.base.weight @ a.base.weight.T for a in three))
        U = vectors[:, values.argsort(descending=True)[:3]]  # (12, 3)
        B = three[0].lora_B
        close(B.T @ B, torch.eye(3).double())
        close(B @ B.T, U @ U.T)
        assert all(a.lora_B is B and not a.lora_A.any() for a in three)
        assert all((column.max() == column.abs().max()) for column in B.T)
        mine = [trained[f"layers.{i}.{place}"] for place in QKV]
        assert all(torch.equal(a.lora_B, B) and not a.lora_A.any() for a in mine)
        assert len({id(a.lora_B) for a in mine}) == 3
    before = {n: a.lora_B.detach().clone() for n, a in layers.items()}
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
    m(**tiny.batch(m.config)).loss.backward()
    optimizer.step()
    for name, a in layers.items():
        assert torch.equal(a.lora_B, before[name]) and a.lora_A.abs().max() > 0.09
        projected = before[name] @ before[name].T @ a.delta_w()
        close(projected, a.delta_w(), atol=1e-13)  # ΔW lies in span(B)


def test_tied_and_condlora_share_over_blocks_and_not_over_places():
    for kind in ("tied", "condlora"):
        _, layers = inject(kind)
        for place in QKV:
            mine = [a for n, a in layers.items() if place_of(n) == place]
            assert len({id(a.lora_A) for a in mine}) == len({id(a.lora_B) for a in mine}) == 1
        assert len({id(a.lora_A) for a in layers.values()}) == 3
        assert inject(kind)[1]["layers.2.q_proj"].lora_A.equal(layers["layers.0.q_proj"].lora_A)


# -------------------------------------------------------------------------------- copies and scores


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_shares_within_itself_alone(kind):
    m, _ = generic(kind)
    batch = tiny.batch(m.config)
    m(**batch).loss.backward()  # a graph has been there
    twin = copy.deepcopy(m)
    logits = m(**batch).logits.detach()
    same = lora.adapters(twin)
    assert len(lora.trainable(twin)) == len(lora.trainable(m))
    assert len(list(twin.parameters())) == len(list(m.parameters()))
    mine = {id(p) for p in m.parameters()}
    assert not mine & {id(p) for p in twin.parameters()}
    tiny.randomise([p for n, p in lora.trainable(twin).items() if ".lora_" in n], seed=3)
    close(twin(**batch).logits, expected_logits(kind, "bert", same, batch))
    close(m(**batch).logits, logits, atol=0)


@pytest.mark.filterwarnings("ignore:all alpha_test")
@pytest.mark.parametrize("kind", KINDS)
def test_every_proxy_scores_and_leaves_no_trace(kind):
    m, layers = generic(kind, num_layers=2)
    batches = [tiny.batch(m.config, seed) for seed in (0, 1)]
    lora.switch(m, set(list(layers)[1:]))
    before = copy.deepcopy(m.state_dict())
    for proxy in proxies.PROXIES:
        if f"--proxy {proxy}" in INCOMPATIBLE.get(kind, {}):
            continue
        scores = proxies.score(proxy, m, batches)
        assert list(scores) == list(layers)
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    m, layers = inject(kind, num_layers=2)
    with pytest.warns(UserWarning, match="all snip scores are zero"):
        proxies.score("snip", m, batches)
    assert min(proxies.score("grad_norm", m, batches).values()) > 0


def test_scores_of_what_is_shared():
    """The whole gradient of A and B for every module of a place, and its own u and v."""
    m, layers = generic("tied")
    batch = tiny.batch(m.config)
    scores = proxies.score("grad_norm", m, [batch])
    m(**batch).loss.backward()
    for name, a in layers.items():
        norms = [f.grad.square().sum().sqrt() for f in (a.lora_A, a.lora_B, a.lora_u, a.lora_v)]
        assert scores[name] == pytest.approx(sum(norms).item(), abs=1e-12)
    m, layers = generic("condlora")
    for proxy in ("grad_norm", "snip", "grasp"):
        scores = proxies.score(proxy, m, [batch])
        assert len({f"{s:.12g}" for s in scores.values()}) == 3  # one for each place
    assert len({f"{s:.12g}" for s in proxies.score("grad_norm_slot", m, [batch]).values()}) == 9


def test_grasp_takes_what_is_shared_once():
    """theta . H g, with H g by a difference of gradients along g."""
    m, layers = generic("tied", num_layers=2)
    batch = tiny.batch(m.config)
    scores = proxies.score("grasp", m, [batch])
    own = [p for n, p in lora.trainable(m).items() if ".lora_" in n]

    def gradient():
        return torch.autograd.grad(m(**batch).loss, own)

    g, eps = gradient(), 1e-5
    with torch.no_grad():
        [p.add_(eps * d) for p, d in zip(own, g, strict=True)]
    high = gradient()
    with torch.no_grad():
        [p.sub_(2 * eps * d) for p, d in zip(own, g, strict=True)]
    low = gradient()
    with torch.no_grad():
        [p.add_(eps * d) for p, d in zip(own, g, strict=True)]
    terms = {
        id(p): (p * (h - k) / (2 * eps)).sum().item()
        for p, h, k in zip(own, high, low, strict=True)
    }
    for name, a in layers.items():
        expected = sum(terms[id(f)] for f in a.factors().values())
        assert scores[name] == pytest.approx(expected, rel=1e-4, abs=1e-9)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_file_loads_with_equal_logits(kind, tmp_path):
    """As plain LoRA where it is one; else under its own kind, and by its class alone."""
    m, layers = generic(kind, shortcuts=("residual_1", "shortcut_sa"))
    lora.switch(m, set(layers) - {"layers.1.k_proj"})
    lora.save_adapter(m, tmp_path / "a.safetensors")
    batch, loaded = tiny.batch(m.config), tiny.model("bert")
    if kind in LINEAR:
        lora.load_adapter(loaded, tmp_path / "a.safetensors")
        assert all(type(a) is lora.LoRALayer for a in lora.adapters(loaded).values())
    else:
        with pytest.raises(ValueError, match=f"holds {kind}, which is no LoRA"):
            lora.load_adapter(loaded, tmp_path / "a.safetensors")
        lora.load_adapter(loaded, tmp_path / "a.safetensors", adapter=ADAPTERS[kind])
    assert {n for n, a in lora.adapters(loaded).items() if not a.enabled} == {"layers.1.k_proj"}
    close(loaded(**batch).logits, m(**batch).logits)


def test_delta_lora_goes_with_cora_trained(tmp_path):
    """W moves by lambda s times the change of B A, and the file holds all of it on W_0."""
    m, layers = inject("cora_trained")
    batch, begin = tiny.batch(m.config), {n: a.base.weight.clone() for n, a in layers.items()}
    optimizer, delta_lora = torch.optim.SGD(m.parameters(), lr=0.5), DeltaLoRA(m, 2.0, -1)
    for _ in range(3):
        m(**batch).loss.backward()
        delta_lora.before_step()
        optimizer.step()
        delta_lora.after_step()
    for name, a in layers.items():
        close(a.base.weight - begin[name], 2 * S * a.lora_B @ a.lora_A)  # A_0 = 0
    lora.save_adapter(m, tmp_path / "a.safetensors", delta_lora.export())
    loaded = tiny.model("bert")
    lora.load_adapter(loaded, tmp_path / "a.safetensors")
    close(loaded(**batch).logits, m(**batch).logits)


@pytest.fixture
def flags(tmp_path):
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 2 --epochs 2 --batch-size 5 --lr 0.03 "
        f"--targets {','.join(QKV)} --log-every 1 --device cpu --schedule constant"
    )
    return text.split()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dynamic_run_resumes_to_the_bits_and_exports(kind, flags, tmp_path, monkeypatch):
    """Interrupted between two decisions; what is shared is spent once in the table and the log."""
    given = [*flags, "--adapter", kind, "--keep", "0.5", "--every", "0.4", "--shortcuts"]
    whole, _ = whole_and_interrupted([*given, "none"], tmp_path, monkeypatch, 6)
    if kind not in LINEAR:
        with pytest.raises(ValueError, match=f"holds {kind}: its modules add no matrix"):
            writing.export(whole, tmp_path / "peft")
        return
    config = writing.export(whole, tmp_path / "peft")
    tensors = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    stored = train.load_pretrained(str(tmp_path / "model"))[0]
    layers = lora.load_adapter(stored, whole)
    on = {n: a for n, a in layers.items() if a.enabled}
    assert len(config["target_modules"]) == len(on) == 3
    for name, a in on.items():
        path = "base_model.model." + writing.full_path("bert", name)
        A, B = (tensors[f"{path}.lora_{x}.weight"] for x in "AB")
        close((B @ A).double(), a.delta_w().double(), atol=1e-7)


@pytest.mark.parametrize("kind", ["cora_trained", "reslora_block", "reslora_input"])
@pytest.mark.parametrize("allocate", ["static", "dynamic"])
def test_single_ranks_go_on_and_off(kind, allocate, flags, tmp_path, monkeypatch):
    """7 of 12 ranks, 24 parameters each: the file holds those that are on."""
    more = f"--adapter {kind} --allocate {allocate} --per-rank yes --budget-params 168".split()
    more += ["--every", "0.4"] if allocate == "dynamic" else []
    given = [*flags, *more, "--shortcuts", "none", "--seed", "1"]
    whole, _ = whole_and_interrupted(given, tmp_path, monkeypatch, 6)
    model = train.load_pretrained(str(tmp_path / "model"))[0].eval()
    layers = lora.load_adapter(model, whole, adapter=ADAPTERS[kind])
    run = train.prepare(parse_flags(["--resume", str(whole), "--eval-only"]), None)
    batch = tiny.batch(model.config)
    close(model(**batch).logits, run.model.eval()(**batch).logits, atol=1e-5)
    if kind != "reslora_block":
        assert sum(a.r * a.enabled for a in layers.values()) == 7


def test_the_run_says_what_is_spent_with_what_is_shared_once(flags, tmp_path, capsys):
    """2 blocks x 3 places of 12 x 12, r 2: 3 of 6 on. condlora: 48 a place that has one on."""
    out = tmp_path / "run"
    given = [*flags, "--adapter", "condlora", "--allocate", "static", "--shortcuts", "none"]
    assert train.main([*given, "--proxy", "random", "--seed", "3", "--out", str(out)]) == 0
    [decision] = json.loads((out / "allocation.json").read_text())["history"]
    places = {place_of(name) for name, on in decision["on"].items() if on}
    assert f"3 of 6 modules on, {48 * len(places)} parameters (all 144)" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- bad input


REFUSED = {  # what is in the table of incompatible.py, written a second time: method -> flags
    "dora": "delta-ratio per-rank",
    "asymmetry": "delta-ratio per-rank fisher riemannian lora_pro lora_rite",
    "lora_xs": "delta-ratio per-rank fisher riemannian lora_pro lora_rite loraplus",
    "sbora_fa": "delta-ratio per-rank fisher riemannian lora_pro lora_rite",
    "sbora_fb": "delta-ratio per-rank riemannian lora_pro lora_rite loraplus",
    "prolora": "delta-ratio per-rank fisher riemannian lora_pro lora_rite",
    "tied": "delta-ratio per-rank fisher size riemannian lora_pro lora_rite budget-params when-off",
    "condlora": "delta-ratio per-rank fisher size riemannian lora_pro lora_rite loraplus "
    "budget-params when-off shard",
    "cora": "delta-ratio per-rank riemannian lora_pro lora_rite loraplus",
    "reslora_input": "delta-ratio",
    "reslora_block": "delta-ratio when-off",
    "reslora_middle": "delta-ratio per-rank riemannian lora_pro lora_rite when-off",
    "lora_rite": "per-rank",
    "adalora": "adapter delta-ratio riemannian lora_pro lora_rite",
    "alora": "adapter delta-ratio optimizer",
}


def test_no_refusal_has_gone_missing():
    words = {method: set() for method in INCOMPATIBLE}
    for method, flags in INCOMPATIBLE.items():
        for flag in flags:
            name, _, value = flag.removeprefix("--").partition(" ")
            words[method].add(value if name in ("optimizer", "proxy") and value else name)
    assert words == {method: set(flags.split()) for method, flags in REFUSED.items()}


@pytest.mark.parametrize("kind, feature", [(k, f) for k in KINDS for f in INCOMPATIBLE.get(k, {})])
def test_what_does_not_go_together_is_refused_by_name(kind, feature, capsys):
    more = {
        "--budget-params": ["--budget-params", "500"],
        "--delta-ratio": ["--delta-ratio", "2"],
        "--per-rank yes": ["--per-rank", "yes", "--budget-params", "500"],
    }
    given = ["--targets", ",".join(QKV), "--adapter", kind, *more.get(feature, feature.split())]
    assert train.main(given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--adapter {kind} does not go with {feature}" in said
    assert INCOMPATIBLE[kind][feature] in said


def test_what_a_layer_cannot_have_is_refused_and_the_model_stays():
    cases = [
        ("condlora", ("q_proj", "fc1"), 3, "condlora needs square weights, this one is 20 x 12"),
        ("cora", ("q_proj", "v_proj"), 3, "cora needs the targets q_proj,k_proj,v_proj and no"),
        ("cora_trained", (*QKV, "fc1"), 3, "and no other, got q_proj,k_proj,v_proj,fc1"),
        *((kind, QKV, 13, "r is 13, allowed: an integer from 1 to 12") for kind in KINDS),
    ]
    for kind, targets, r, said in cases:
        m = tiny.model("bert")
        with pytest.raises(ValueError, match=said):
            lora.inject(m, targets, r=r, adapter=ADAPTERS[kind])
        assert not lora.adapters(m)
    m = tiny.model("bert")
    m.layers[1].k_proj = torch.nn.Linear(12, 24).double()
    with pytest.raises(ValueError, match=r"q, k and v of one size, layers.1 has \(12, 12\), \(24"):
        lora.inject(m, QKV, r=3, adapter=ADAPTERS["cora"])


def test_an_adapter_without_targets_is_refused():
    with pytest.raises(ValueError, match="--adapter tied needs --targets"):
        parse_flags(["--adapter", "tied", "--targets", "none"])


def test_the_control_has_the_very_numbers_of_the_run():
    """16 / 12 per rank is no number of six digits; a rate of eight has eight."""
    text = "--lr 0.0012345678 --r 12 --lora-alpha 16 --shortcuts none --delta-ratio -0.5"
    args = parse_flags([*text.split(), "--allocate", "static"])
    command, _ = equal_budget_control(args, 7 * 20, {"a": 120, "b": 120})
    control = parse_flags(command.split()[2:])
    assert (control.r, control.lr, control.delta_ratio) == (7, 0.0012345678, -0.5)
    assert control.lora_alpha == 16 / 12 * 7


def test_the_control_is_of_equal_cost_or_none():
    """None where the parameters are not r times those of rank 1."""
    for kind in ADAPTERS:
        text = f"--adapter {kind} --targets q_proj,k_proj,v_proj --allocate static"
        control = equal_budget_control(parse_flags(text.split()), 100, {"a": 160, "b": 160})
        if kind in ("dora", "lora_xs", "prolora", "tied"):
            assert control is None
        else:
            assert kind == "lora" or f"--adapter {kind}" in control[0]
