"""delta_lora.py against its algebra: telescoping, rank, and plain LoRA with a rescaled alpha."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

import lora
import proxies
import tiny
import train
from delta_lora import DeltaLoRA, delta_update_
from relatives.dora import DoRA
from support.flags import parse_flags
from test_train import whole_and_interrupted
from tools.faults import same

TARGETS = ("q_proj", "fc1")


def problem(family="bert", alpha=5, r=2):
    """A float64 model at initialisation (B = 0), generic otherwise."""
    m = tiny.model(family)
    lora.inject(m, TARGETS, r=r, lora_alpha=alpha)
    lora.mark_trainable(m)
    return m


def adamw(m, lr=0.02, eps=1e-8, decay=0.1):
    pairs = [p for a in lora.adapters(m).values() for p in (a.lora_A, a.lora_B)]
    head = [p for n in m.head for p in m.get_submodule(n).parameters()]
    groups = [{"params": pairs, "eps": eps}, {"params": head}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=decay)


def sgd(m, lr=0.02):
    return torch.optim.SGD(lora.trainable(m).values(), lr=lr)


def run(m, steps, optimizer, delta=None, clip=None, watch=None, switch=None):
    """The loop, spelt out; returns the losses."""
    losses = []
    for step in range(steps):
        if switch:
            switch(step)
        loss = m(**tiny.batch(m.config, seed=step)).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(lora.trainable(m).values(), clip)
        if delta:
            delta.before_step()
        optimizer.step()
        if delta:
            delta.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if watch:
            watch(step + 1)
    return losses


def products(m):
    """P = B A of every module."""
    return {n: (a.lora_B @ a.lora_A).detach().clone() for n, a in lora.adapters(m).items()}


def weights(m):
    return {n: a.base.weight.detach().clone() for n, a in lora.adapters(m).items()}


# --------------------------------------------------------------------------------------- the update


def test_update_entry_by_entry():
    """W + lambda s (B' A' - B A), every entry a sum of products; in place."""
    rng = torch.Generator().manual_seed(0)
    w, a, b = (
        torch.randn(5, 4, generator=rng),
        torch.randn(2, 4, generator=rng),
        torch.randn(5, 2, generator=rng),
    )
    a2, b2 = a + torch.randn(2, 4, generator=rng), b + torch.randn(5, 2, generator=rng)
    before, pointer = w.clone(), w.data_ptr()
    delta_update_(w, a2, b2, a, b, 1.7)
    assert w.data_ptr() == pointer
    for o in range(5):
        for i in range(4):
            change = sum((b2[o, k] * a2[k, i] - b[o, k] * a[k, i]).item() for k in range(2))
            assert w[o, i].item() == pytest.approx(before[o, i].item() + 1.7 * change, abs=1e-5)


def test_one_step_by_hand():
    """SGD from B = 0: P' = B' A, B' = -lr s G A^T, so W' - W = -lambda s lr s G A^T A."""
    m = problem()
    layers = lora.adapters(m)
    g = {}
    for layer in layers.values():
        layer.base.weight.requires_grad_(True)
    m(**tiny.batch(m.config)).loss.backward()
    for name, layer in layers.items():
        g[name] = layer.base.weight.grad.clone()
        layer.base.weight.requires_grad_(False)
        layer.base.weight.grad = None
    m.zero_grad()
    before, a0 = weights(m), {n: a.lora_A.detach().clone() for n, a in layers.items()}
    run(m, 1, sgd(m, 0.1), DeltaLoRA(m, ratio=0.7, start=-1))
    s = 5 / 2
    for name, w in weights(m).items():
        expected = before[name] - 0.7 * s * 0.1 * s * g[name] @ a0[name].T @ a0[name]
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("start", [-1, 0, 3])
def test_weights_move_first_after_step_k_plus_2(start):
    """Bit for bit the same after steps 1 … K + 1, and by P(K+2) - P(K+1) after step K + 2."""
    m = problem()
    w0, record = weights(m), []
    run(
        m,
        7,
        adamw(m),
        DeltaLoRA(m, 2.0, start),
        watch=lambda _: record.append((weights(m), products(m))),
    )
    for n in range(1, start + 2):
        assert same(record[n - 1][0], w0)
    w, p = record[start + 1]
    for name in w0:
        before = record[start][1][name] if start >= 0 else torch.zeros_like(p[name])
        expected = w0[name] + 2.0 * 2.5 * (p[name] - before)
        assert not torch.equal(w[name], w0[name])
        torch.testing.assert_close(w[name], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_telescoping_rank_and_weight_decay(family):
    """W_T - W_0 = lambda s (P_T - P_{K+1}): P's whole change, decay's part included."""
    m = problem(family)
    w0, p = weights(m), []
    run(m, 12, adamw(m, decay=0.5), DeltaLoRA(m, 0.6, 3), watch=lambda _: p.append(products(m)))
    for name, w in weights(m).items():
        expected = 0.6 * 2.5 * (p[-1][name] - p[3][name])
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(w - w0[name], expected, rtol=0, atol=1e-14)
        effective = w + 2.5 * p[-1][name] - w0[name]
        assert torch.linalg.matrix_rank(effective, rtol=1e-9) == 4


def test_rank_is_r_from_the_first_step():
    m = problem()
    w0 = weights(m)
    run(m, 12, adamw(m), DeltaLoRA(m, 0.6, -1))
    for name, w in weights(m).items():
        assert torch.linalg.matrix_rank(w - w0[name], rtol=1e-9) == 2


def test_ratio_zero_is_lora_to_the_bit():
    plain, delta = problem(), problem()
    first = run(plain, 8, adamw(plain))
    assert run(delta, 8, adamw(delta), DeltaLoRA(delta, 0.0, -1)) == first
    assert same(dict(plain.named_parameters()), dict(delta.named_parameters()))


# ------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_adamw_from_step_0_is_lora_with_alpha_times_1_plus_lambda(family):
    """Same lr and decay; eps scaled by 1 + lambda, since the gradients are. A, B equal as well."""
    ratio = 1.5
    delta, plain = problem(family), problem(family, alpha=5 * (1 + ratio))
    first = run(delta, 50, adamw(delta), DeltaLoRA(delta, ratio, -1))
    assert first == pytest.approx(run(plain, 50, adamw(plain, eps=1e-8 * (1 + ratio))), abs=1e-10)
    for a, b in zip(lora.adapters(delta).values(), lora.adapters(plain).values(), strict=True):
        torch.testing.assert_close(a.lora_A, b.lora_A, rtol=0, atol=1e-9)
        torch.testing.assert_close(a.lora_B, b.lora_B, rtol=0, atol=1e-9)
    control = problem(family)
    assert first != pytest.approx(run(control, 50, adamw(control)), abs=1e-3)


def test_sgd_from_step_0_is_lora_with_the_rate_divided():
    ratio = 1.5
    delta, plain = problem(), problem(alpha=5 * (1 + ratio))
    first = run(delta, 30, sgd(delta, 0.3), DeltaLoRA(delta, ratio, -1))
    pairs = [p for a in lora.adapters(plain).values() for p in (a.lora_A, a.lora_B)]
    head = [p for n in plain.head for p in plain.get_submodule(n).parameters()]
    groups = [{"params": pairs, "lr": 0.3 / (1 + ratio)}, {"params": head}]
    second = run(plain, 30, torch.optim.SGD(groups, lr=0.3))
    assert first == pytest.approx(second, abs=1e-12)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("start", [-1, 10])
def test_lazy_mode_gives_the_same_losses(optimizer, clip, start):
    """LoRA with forward weight W_0 + s B A + lambda s (sg[B A] - P_{K+1}); W_0 keeps its bits."""
    eager, lazy = problem(), problem()
    w0 = weights(lazy)
    first = run(eager, 25, optimizer(eager), DeltaLoRA(eager, 1.5, start), clip)
    second = run(lazy, 25, optimizer(lazy), DeltaLoRA(lazy, 1.5, start, lazy=True), clip)
    assert first == pytest.approx(second, abs=1e-12)
    assert same(weights(lazy), w0) and not same(weights(eager), w0)


def test_alpha_test_scales_the_branch_alone_in_lazy_mode_too():
    """What the weight has gained is the weight's: half of s B A leaves it whole."""
    eager, lazy = problem(), problem()
    for m, is_lazy in ((eager, False), (lazy, True)):
        run(m, 25, adamw(m), DeltaLoRA(m, 1.5, 0, lazy=is_lazy))
        for layer in lora.adapters(m).values():
            layer.scaling *= 0.5
    batch = tiny.batch(eager.config)
    torch.testing.assert_close(eager(**batch).logits, lazy(**batch).logits, rtol=0, atol=1e-12)


def test_why_dropout_is_refused():
    """dL/d(BA) = s dL/dW without branch dropout, and not with it."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 7, generator=rng, dtype=torch.float64)
    for dropout in (0.0, 0.5):
        layer = lora.LoRALayer(nn.Linear(7, 5).double(), 7, 5, 2, 3, dropout, rng)
        tiny.randomise(layer.parameters(), 1)
        torch.manual_seed(0)
        layer(x).square().sum().backward()
        g, s = layer.base.weight.grad, 3 / 2
        b = layer.lora_B.detach()
        identity = torch.allclose(layer.lora_A.grad, s * b.T @ g, rtol=0, atol=1e-12)
        assert identity == (dropout == 0.0)


# ---------------------------------------------------------------------------- when it must not move


def test_forward_eval_and_micro_batches_do_not_move_weights():
    m = problem()
    delta = DeltaLoRA(m, 2.0, -1)
    run(m, 2, adamw(m), delta)
    w = weights(m)
    for mode in (True, False):
        m.train(mode)
        for i in range(3):
            m(**tiny.batch(m.config, seed=i)).loss.backward()
    assert same(weights(m), w)
    m.zero_grad()


def test_once_per_optimizer_step_with_accumulation(tmp_path):
    """Two micro-batches or one batch: the same weights, float64."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = (
        f"--preset lora --task mrpc --data-dir {task} --model {model} --r 2 --lr 0.01 --device cpu"
    )
    results = []
    for groups in ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]):
        flags = [*text.split(), "--delta-ratio", "2", "--delta-start", "-1"]
        trained = train.set_up(parse_flags(flags))
        trained.model.double()
        calls = []
        after = trained.delta.after_step
        trained.delta.after_step = lambda after=after, calls=calls: (calls.append(1), after())
        for _ in range(3):
            train.train_step(trained, groups, 0.01)
        assert len(calls) == 3 and trained.delta.t == 3
        results.append(weights(trained.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-9)


def test_weights_stay_out_of_the_optimizer():
    m = problem()
    optimizer = adamw(m)
    run(m, 3, optimizer, DeltaLoRA(m, 2.0, -1))
    for layer in lora.adapters(m).values():
        assert not layer.base.weight.requires_grad and layer.base.weight.grad is None
        assert layer.base.weight not in optimizer.state


def broken(change):
    m = problem()
    change(m)
    return m


def tie(m):
    m.layers[1].q_proj.base.weight = m.layers[0].q_proj.base.weight


@pytest.mark.parametrize(
    ("change", "ratio", "start", "message"),
    [
        (lambda m: None, float("nan"), 0, "ratio is nan, allowed: a finite number"),
        (lambda m: None, 1.0, -2, "start is -2, allowed: an integer from -1"),
        (
            lambda m: setattr(m.layers[0].fc1, "lora_dropout", 0.1),
            1.0,
            0,
            r"layers\.0\.fc1 has lora_dropout 0\.1",
        ),
        (lambda m: m.bfloat16(), 1.0, 0, "has a weight in torch.bfloat16: most increments"),
        (
            tie,
            1.0,
            0,
            r"shared \(layers\.0\.q_proj\.base\.weight, layers\.1\.q_proj\.base\.weight\)",
        ),
        (
            lambda m: setattr(m.layers[0].fc1.base, "twin", m.layers[0].fc1.base.weight),
            1.0,
            0,
            r"shared \(layers\.0\.fc1\.base\.twin, layers\.0\.fc1\.base\.weight\)",
        ),
        (
            lambda m: setattr(m.layers[1].q_proj, "base", m.layers[0].q_proj.base),
            1.0,
            0,
            r"shared \(layers\.0\.q_proj\.base\.weight, layers\.1\.q_proj\.base\.weight\)",
        ),
        (
            lambda m: m.layers[2].fc1.base.weight.requires_grad_(True),
            1.0,
            0,
            "has a trainable weight",
        ),
        (lora.merge, 1.0, 0, "is merged"),
        (
            lambda m: setattr(m.layers[0].fc1, "__class__", DoRA),
            1.0,
            0,
            r"layers\.0\.fc1 is a DoRA: Delta-LoRA is for the B A of its own",
        ),
    ],
)
def test_refusals(change, ratio, start, message):
    with pytest.raises(ValueError, match=message):
        DeltaLoRA(broken(change), ratio, start)


def test_needs_a_linear_base():
    m = tiny.model("bert")
    lora.inject(m, (), r=2, shortcuts=("residual_1", "shortcut_sa"))
    with pytest.raises(ValueError, match="no weight to move"):
        DeltaLoRA(m)


def test_nothing_is_done_to_a_merged_weight():
    """Unmerging would put W_T back over what was done to it."""
    m = problem()
    delta = DeltaLoRA(m, 1.0, start=-1)
    run(m, 2, adamw(m), delta)
    state, moved = delta.state(), delta.weight_change()
    lora.merge(m)
    for call in (delta.before_step, delta.back_to_pretrained, delta.state):
        with pytest.raises(ValueError, match="is merged: call unmerge"):
            call()
    with pytest.raises(ValueError, match="is merged: call unmerge"):
        delta.load(state)
    lora.unmerge(m)
    assert delta.weight_change() == moved and min(moved.values()) > 0


def test_a_lazy_model_has_one_hook_and_no_score_that_reads_its_weights():
    m = problem()
    delta = DeltaLoRA(m, 1.0, start=-1, lazy=True)
    run(m, 2, adamw(m), delta)
    with pytest.raises(ValueError, match="has a forward hook already: lazy=True needs a fresh"):
        DeltaLoRA(m, 0.5, start=-1, lazy=True)
    batches = [tiny.batch(m.config)]
    for proxy in ("synflow", "synflow_released", "snip_slot"):
        with pytest.raises(ValueError, match=f"{proxy} reads weights, and layers.*hook"):
            proxies.score(proxy, m, batches)
    assert min(proxies.score("grad_norm", m, batches).values()) > 0


def test_lazy_mode_works_on_a_shared_base():
    """Both owners read the bits of W_0, and each adds the change of its own pair."""
    m, batch = broken(tie), tiny.batch(tiny.model("bert").config)
    shared = m.layers[0].q_proj.base.weight.clone()
    delta = DeltaLoRA(m, 1.0, 0, lazy=True)
    run(m, 4, adamw(m), delta)
    assert torch.equal(m.layers[0].q_proj.base.weight, shared)
    m.eval()
    expected = m(**batch).logits
    for name, layer in lora.adapters(m).items():  # the same, as weights of their own
        layer.base._forward_hooks.clear()
        moved = layer.base.weight + sum(c * B @ A for A, B, c in delta.terms(name))
        layer.base.weight = nn.Parameter(moved, requires_grad=False)
    assert min(delta.weight_change().values()) > 0
    torch.testing.assert_close(m(**batch).logits, expected, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------- with an allocation


def moved_through(m, delta, optimizer, chosen):
    """18 steps in which modules go on and off: dict name -> sum of lambda s (P' - P) while on.

    Args:
        delta: with lambda 0.8 and K 1. chosen: dict name -> steps before which it is switched.
    """
    layers = lora.adapters(m)
    expected = {n: torch.zeros_like(w) for n, w in weights(m).items()}
    last = {}

    def switch(step):
        for name, turns in chosen.items():
            layers[name].enabled = sum(t <= step for t in turns) % 2 == 1
        last.update({n: (layers[n].enabled, p) for n, p in products(m).items()})

    def watch(n):
        for name, p in products(m).items():
            enabled, before = last[name]
            if enabled and n >= 3:  # K = 1: the first move is after step 3
                expected[name] += 0.8 * 2.5 * (p - before)
            elif not enabled:
                assert torch.equal(p, before)

    run(m, 18, optimizer, delta, watch=watch, switch=switch)
    return expected


@pytest.mark.parametrize("lazy", [False, True])
def test_stretches_through_several_reallocations(lazy):
    """Modules go on and off by turns, and an off module keeps its W.

    W_T - W_0 = lambda s sum (P_end - P_begin) over the stretches; the export is exact, of rank 2r
    at most.
    """
    m, twin = problem(), problem()
    w0, layers = weights(m), lora.adapters(m)
    delta, optimizer = DeltaLoRA(m, 0.8, 1, lazy), adamw(m)
    chosen = {"layers.0.q_proj": (0, 4, 9), "layers.1.fc1": (3, 6, 14), "layers.2.q_proj": ()}
    expected = moved_through(m, delta, optimizer, chosen)
    batch = tiny.batch(m.config, seed=99)
    for name, w in weights(m).items():
        assert expected[name].any() == (name != "layers.2.q_proj")
        if not lazy:
            torch.testing.assert_close(w - w0[name], expected[name], rtol=0, atol=1e-13)
    exported = delta.export()
    for name, layer in layers.items():
        A, B = exported[name]
        assert len(A) <= 2 * layer.r
        effective = w0[name] + expected[name] + layer.delta_w().detach() * layer.enabled
        torch.testing.assert_close(w0[name] + B @ A, effective, rtol=0, atol=1e-13)
    for name, layer in lora.adapters(twin).items():  # plain LoRA on W_0, nothing of W shipped
        A, B = exported[name]
        layer.enabled, layer.scaling = len(A) > 0, 1.0
        layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
    for part in m.head:
        twin.get_submodule(part).load_state_dict(m.get_submodule(part).state_dict())
    torch.testing.assert_close(twin(**batch).logits, m(**batch).logits, rtol=0, atol=1e-12)


def test_a_redrawn_pair_begins_a_new_stretch():
    m = problem()
    delta, optimizer, w0 = DeltaLoRA(m, 0.8, -1), adamw(m), weights(m)
    run(m, 5, optimizer, delta)
    for name in delta.adapters:
        delta.end_stretch(name)
    first = products(m)
    tiny.randomise([p for a in lora.adapters(m).values() for p in (a.lora_A, a.lora_B)], 7)
    second = products(m)
    run(m, 5, optimizer, delta)
    for name, w in weights(m).items():
        expected = w0[name] + 0.8 * 2.5 * (first[name] + products(m)[name] - second[name])
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-13)
        A, B = delta.export()[name]
        total = expected + lora.adapters(m)[name].delta_w().detach()
        torch.testing.assert_close(w0[name] + B @ A, total, rtol=0, atol=1e-13)


def test_a_pair_redrawn_while_off_begins_anew():
    """Switching off ends the stretch by itself: what happens to the pair meanwhile is not W's."""
    m = problem()
    delta, optimizer, w0 = DeltaLoRA(m, 0.8, -1), adamw(m), weights(m)
    name = "layers.1.fc1"
    layer = lora.adapters(m)[name]
    run(m, 4, optimizer, delta)
    end, w_end = products(m)[name], weights(m)[name]
    layer.enabled = False
    run(m, 2, optimizer, delta)
    assert torch.equal(weights(m)[name], w_end)
    tiny.randomise([layer.lora_A, layer.lora_B], 7)
    begin = products(m)[name]
    layer.enabled = True
    run(m, 4, optimizer, delta)
    expected = w0[name] + 0.8 * 2.5 * (end + products(m)[name] - begin)
    torch.testing.assert_close(weights(m)[name], expected, rtol=0, atol=1e-13)
    A, B = delta.export()[name]
    assert len(A) == 3 * layer.r  # P_T, P_begin and P_end: nothing cancels here
    total = expected + layer.delta_w().detach()
    torch.testing.assert_close(w0[name] + B @ A, total, rtol=0, atol=1e-13)


# --------------------------------------------------------- merging, exporting, going back, resuming


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merge_off_and_back(family):
    """Merged = W_T + s B A (not (1 + lambda) s); off = W_T; back = W_0 up to rounding."""
    m = problem(family)
    w0, delta = weights(m), DeltaLoRA(m, 0.8, 2)
    run(m, 10, adamw(m), delta)
    w, p, batch = weights(m), products(m), tiny.batch(m.config, seed=50)
    logits = m(**batch).logits
    lora.merge(m)
    for name, merged in weights(m).items():
        torch.testing.assert_close(merged, w[name] + 2.5 * p[name], rtol=0, atol=1e-14)
    torch.testing.assert_close(m(**batch).logits, logits, rtol=0, atol=1e-12)
    lora.unmerge(m)
    assert same(weights(m), w)
    for layer in lora.adapters(m).values():
        layer.enabled = False
    off = tiny.model(family)
    off.load_state_dict(
        {n.replace(".base", ""): v for n, v in m.state_dict().items() if "lora_" not in n}
    )
    assert torch.equal(m(**batch).logits, off(**batch).logits)
    delta.back_to_pretrained()
    for name, back in weights(m).items():
        torch.testing.assert_close(back, w0[name], rtol=0, atol=1e-13)
    assert all(len(A) == 0 for A, _ in delta.export().values())


def test_going_back_forgets_every_stretch():
    """Those that have ended too: going back twice changes no bit, and W can move anew."""
    m = problem()
    w0, delta, optimizer = weights(m), DeltaLoRA(m, 0.8, -1), adamw(m)
    layer = lora.adapters(m)["layers.1.fc1"]
    for layer.enabled in (True, False, True):
        run(m, 3, optimizer, delta)
    delta.back_to_pretrained()
    back = weights(m)
    for name, w in back.items():
        torch.testing.assert_close(w, w0[name], rtol=0, atol=1e-13)
    delta.back_to_pretrained()
    assert same(weights(m), back) and set(delta.weight_change().values()) == {0.0}
    before = products(m)
    run(m, 3, optimizer, delta)
    for name, w in weights(m).items():
        expected = back[name] + 0.8 * 2.5 * (products(m)[name] - before[name])
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-13)


@pytest.fixture
def flags(tmp_path):
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 2 --epochs 2 --batch-size 5 --lr 0.01"
    )
    return [
        *text.split(),
        *["--delta-ratio", "2", "--delta-start", "1", "--device", "cpu", "--every", "0.4"],
    ]


@pytest.mark.parametrize("extra", ["--preset lora", "--allocate dynamic", "--delta-lazy yes"])
@pytest.mark.parametrize("stop_after", [2, 6])
def test_resuming_gives_the_same_bits(flags, tmp_path, monkeypatch, extra, stop_after):
    flags = [f for f in flags if "lora" not in extra or f not in ("--every", "0.4")] + extra.split()
    whole_and_interrupted(flags, tmp_path, monkeypatch, stop_after)


def test_the_adapter_file_is_the_whole_truth(flags, tmp_path):
    """adapter.safetensors on the pretrained weights gives the logits; A, B alone would not."""
    import json

    from safetensors import safe_open

    out = tmp_path / "run"
    assert train.main([*flags, "--out", str(out)]) == 0
    trained = train.prepare(parse_flags(["--eval-only", "--resume", str(out)]), ExitStack())
    fresh = train.set_up(parse_flags(flags))
    with safe_open(out / "adapter.safetensors", "pt") as file:
        about = json.loads(file.metadata()["adapters"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for name, layer in lora.adapters(fresh.model).items():
        layer.lora_A = nn.Parameter(tensors[f"{name}.lora_A"])
        layer.lora_B = nn.Parameter(tensors[f"{name}.lora_B"])
        layer.scaling, layer.enabled = about[name]["scaling"], about[name]["enabled"]
    for name in ("classifier.weight", "classifier.bias"):
        fresh.model.get_parameter(name).data.copy_(tensors[name])
    batch = train.batch_of(fresh.model, fresh.dev)
    expected = trained.model.eval()(**batch).logits
    torch.testing.assert_close(fresh.model.eval()(**batch).logits, expected, rtol=0, atol=1e-5)
    moved = [
        n
        for n, a in lora.adapters(trained.model).items()
        if n in trained.delta.adapters and a.enabled
    ]
    assert any(about[n]["r"] > 2 for n in moved)


def test_preset_and_conflicts(flags, tmp_path, capsys):
    args = parse_flags(["--preset", "delta-lora"])
    assert (args.delta_ratio, args.delta_start, args.allocate, args.shortcuts) == (
        *(2.0, None),  # K: a third of the first epoch, which is not known yet
        *("none", "none"),
    )
    released = parse_flags(["--preset", "delta-lora-released"])
    assert (released.delta_ratio, released.delta_start, released.r) == (2.0, 500, 8)
    own_start = [f for f in flags if f not in ("--delta-start", "1")]
    run = train.set_up(parse_flags([*own_start, "--batch-size", "4"]))
    assert len(train.epoch_steps(run, 0)) == 6
    assert run.delta.start == run.args.delta_start == 2  # a third
    for extra, message in (
        ("--lora-dropout 0.1", "--delta-ratio needs --lora-dropout 0"),
        ("--delta-ratio 0", "needs --delta-ratio other than 0"),
        ("--targets none", "--delta-ratio needs --targets"),
        ("--delta-start -2", "'-2' is not an integer from -1 up"),
        ("--delta-lazy yes --proxy synflow", "--proxy synflow reads the weights"),
    ):
        assert train.main([*flags, *extra.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("lazy", [False, True])
def test_weight_change_is_the_norm_of_what_the_weight_moved_by(lazy):
    """Against dense matrices, over two stretches of one module; nothing moves up to the start."""
    m = tiny.adapted("bert")
    layers, w0 = lora.adapters(m), weights(m)
    delta = DeltaLoRA(m, 1.7, start=1, lazy=lazy)
    moved = {name: torch.zeros_like(w) for name, w in w0.items()}  # lambda s sum (P' - P), dense
    for t in range(6):
        layers["layers.1.q_proj"].enabled = t != 3
        before = {name: layer.delta_w().detach() for name, layer in layers.items()}
        delta.before_step()
        on = [a for a in layers.values() if a.enabled]
        tiny.randomise([p for a in on for p in (a.lora_A, a.lora_B)], seed=60 + t)
        delta.after_step()
        for name, layer in layers.items():
            if t > 1 and layer.enabled:
                moved[name] += 1.7 * (layer.delta_w().detach() - before[name])
        expected = {name: w.norm().item() for name, w in moved.items()}
        assert delta.weight_change() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    if not lazy:
        for name, w in weights(m).items():
            torch.testing.assert_close(w - w0[name], moved[name], rtol=0, atol=1e-12)


def test_a_small_weight_change_in_float32():
    m = tiny.adapted("bert", targets=("fc1",), dtype=torch.float32)
    layer, delta = m.layers[0].fc1, DeltaLoRA(m, 1.0, -1)
    delta.before_step()
    before = layer.lora_A.detach().double()
    with torch.no_grad():
        layer.lora_A[0, 0] += 1e-4
    delta.after_step()
    change = layer.lora_B.double() @ (layer.lora_A.double() - before)
    expected = layer.scaling * change.norm().item()
    assert delta.weight_change()["layers.0.fc1"] == pytest.approx(expected, rel=1e-3)
