"""Optimizer rules: each against its definition, and which steps do not see (R A, B R^-1)."""

import math

import pytest
import torch

import lora
import tiny
import train
from relatives import METHODS, lora_plus, lora_pro, lora_rite, plain, riemannian
from relatives.incompatible import INCOMPATIBLE
from support.flags import parse_flags
from test_distributed import in_processes
from test_train import whole_and_interrupted

RULES = ("loraplus", "riemannian", "lora_pro", "lora_rite")
F64 = torch.float64


def point(seed=0, m=7, n=9, r=3, s=1.7):
    """A generic (A, B, G, gA, gB, s), with the gradients of s B A through a full gradient G."""
    rng = torch.Generator().manual_seed(seed)
    A, B, G = (torch.randn(*x, generator=rng, dtype=F64) for x in ((r, n), (m, r), (m, n)))
    return A, B, G, s * B.T @ G, s * G @ A.T, s


def trained(model, optimizer, steps=3, seed=0):
    """Some steps on batches of the tiny model."""
    for step in range(steps):
        model(**tiny.batch(model.config, seed=seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def products(model):
    return {n: a.delta_w().detach() for n, a in lora.adapters(model).items()}


def adapted(change=None, **more):
    """The tiny BERT with pairs on q and fc1; change: a matrix R, (A, B) becomes (R A, B R^-1)."""
    m = tiny.adapted("bert", targets=("q_proj", "fc1"), **more)
    if change is not None:
        with torch.no_grad():
            for layer in lora.adapters(m).values():
                layer.lora_A.copy_(change @ layer.lora_A)
                layer.lora_B.copy_(layer.lora_B @ torch.linalg.inv(change))
    return m


CHANGE = torch.tensor([[2.0, 0.3, -0.5], [0.1, 0.4, 0.7], [-0.6, 0.2, 1.5]], dtype=F64)


# ------------------------------------------------------------------------------------------- LoRA+


def test_loraplus_with_ratio_one_is_adamw_to_the_bits():
    one, other = adapted(), adapted()
    same = lora_plus.optimizer(one, 1e-2, 0.1, ratio=1)
    trained(one, same)
    trained(other, plain.adamw(other, 1e-2, 0.1))
    expected = lora.trainable(other)
    assert all(torch.equal(p, expected[name]) for name, p in lora.trainable(one).items())


def test_loraplus_moves_b_16_times_as_far_and_decays_it_so():
    """Against AdamW at two rates: A and head as at lr, B as at 16 lr, decay included."""
    m, slow, fast = adapted(), adapted(), adapted()
    trained(m, METHODS["optimizer"]["loraplus"](m, 1e-3, 0.3), 1)
    trained(slow, plain.adamw(slow, 1e-3, 0.3), 1)
    trained(fast, plain.adamw(fast, 16e-3, 0.3), 1)
    found, at_lr, at_16_lr = (lora.trainable(x) for x in (m, slow, fast))
    for name, p in found.items():
        expected = at_16_lr if name.endswith("lora_B") else at_lr
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-12)
    assert (found["layers.0.fc1.lora_B"] - at_lr["layers.0.fc1.lora_B"]).abs().max() > 1e-3


def test_the_loop_keeps_the_ratio(run_of):
    run = run_of("loraplus")
    train.train_step(run, train.epoch_steps(run, 0)[0], 0.004)
    assert [g["lr"] for g in run.optimizer.param_groups] == [0.004, 0.064]


# -------------------------------------------------------------------------------------- Riemannian


def test_riemannian_solves_its_two_systems():
    """Put back into the two equations; at B = 0 delta alone is left."""
    A, B, _, gA, gB, s = point()
    new_A, new_B = riemannian.precondition(A, B, gA, gB, s, delta=0.3)
    torch.testing.assert_close(B.T @ (B @ new_A) + 0.3 * new_A, gA, rtol=0, atol=1e-12)
    torch.testing.assert_close(new_B @ A @ A.T + 0.3 * new_B, gB, rtol=0, atol=1e-12)
    by_default, _ = riemannian.precondition(A, 0 * B, gA, gB, s)
    torch.testing.assert_close(by_default, 100 * gA)  # delta is 0.01
    new_A, _ = riemannian.precondition(A, 0 * B, gA, gB, s, delta=0.3)
    torch.testing.assert_close(new_A, gA / 0.3, rtol=0, atol=1e-12)


def test_riemannian_to_first_order_is_two_projections():
    """s Δ(B A) = -eta s^2 (P_B G + G P_A) + O(eta^2), with projections from QR."""
    A, B, G, gA, gB, s = point()
    new_A, new_B = riemannian.precondition(A, B, gA, gB, s, delta=0.0)
    (Q, _), (P, _) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    expected = s * s * (Q @ Q.T @ G + G @ P @ P.T)
    torch.testing.assert_close(s * (new_B @ A + B @ new_A), expected, rtol=0, atol=1e-11)


# ----------------------------------------------------------------------------------------- LoRA-Pro


def test_lora_pro_is_the_least_squares_solution():
    """E against brute force: min ||s B X + s Y A - G|| over all X, Y as one big linear system."""
    A, B, G, gA, gB, s = point()
    new_A, new_B = lora_pro.nearest(A, B, gA, gB, s)
    E = s * B @ new_A + s * new_B @ A
    columns = []
    for shape, product in ((A.shape, lambda X: s * B @ X), (B.shape, lambda Y: s * Y @ A)):
        for i in range(shape[0] * shape[1]):
            unit = torch.zeros(shape, dtype=F64)
            unit.view(-1)[i] = 1
            columns.append(product(unit).flatten())
    design = torch.stack(columns, 1)
    best = torch.linalg.lstsq(design, G.flatten()[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(E.flatten(), design @ best, rtol=0, atol=1e-10)
    # the normal equations
    assert (B.T @ (E - G)).abs().max() < 1e-10 and ((E - G) @ A.T).abs().max() < 1e-10
    assert (E - G).norm() > 0.1


def test_lora_pro_changes_the_gradients_least():
    """Among all (gA', gB') of the same E, X moves along B Z, -Z A: no Z comes nearer to gA, gB."""
    A, B, _, gA, gB, s = point()
    new_A, new_B = lora_pro.nearest(A, B, gA, gB, s)
    far = (new_A - gA).square().sum() + (new_B - gB).square().sum()
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        Z = 1e-4 * torch.randn(3, 3, generator=rng, dtype=F64)
        other = (new_A + Z @ A - gA).square().sum() + (new_B - B @ Z - gB).square().sum()
        assert other > far


def test_the_sylvester_equation():
    rng = torch.Generator().manual_seed(4)
    F, S, C = (torch.randn(5, 5, generator=rng, dtype=F64) for _ in range(3))
    F, S = F @ F.T, S @ S.T
    X = lora_pro.sylvester(lora_pro.spectrum(F), lora_pro.spectrum(S), C)
    assert (F @ X + X @ S - C).norm() / C.norm() < 1e-11


def test_lora_pro_at_b_zero_and_with_a_lost_rank():
    """B = 0: gA' = 0 and gB' = gB (A A^T)^-1 / s^2. A column of B that is 0: still finite, best."""
    A, B, G, _, gB, s = point()
    new_A, new_B = lora_pro.nearest(A, 0 * B, 0 * A, gB, s)
    assert not new_A.any()
    torch.testing.assert_close(s * s * new_B @ A @ A.T, gB, rtol=0, atol=1e-11)
    B[:, 1] = 0
    new_A, new_B = lora_pro.nearest(A, B, s * B.T @ G, gB, s)
    left = s * B @ new_A + s * new_B @ A - G
    assert (B.T @ left).abs().max() < 1e-10 and (left @ A.T).abs().max() < 1e-10


def test_lora_pro_keeps_a_direction_that_is_small():
    """A column of B that is 1e-4 of the others is no lost rank."""
    A, B, G, _, gB, s = point()
    B[:, 1] *= 1e-4
    new_A, new_B = lora_pro.nearest(A, B, s * B.T @ G, gB, s)
    left = s * B @ new_A + s * new_B @ A - G
    assert (torch.linalg.qr(B).Q.T @ left).abs().max() < 1e-6


def test_lora_pro_counts_each_modules_steps_from_one():
    """A module that comes in late has AdamW's first update, lr in each entry, as the first had."""
    m = adapted()
    layers = lora.adapters(m)
    late = layers["layers.1.fc1"]
    late.enabled = False
    optimizer = METHODS["optimizer"]["lora_pro"](m, 1e-3, 0.0)
    before = late.lora_B.detach().clone()
    trained(m, optimizer, 3)
    assert torch.equal(late.lora_B, before)
    late.enabled = True
    trained(m, optimizer, 1, seed=3)
    assert (late.lora_B - before).abs().median().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("rule", ["riemannian", "lora_pro"])
def test_adamw_takes_the_gradients_that_the_rule_makes(rule):
    """Three steps against Adam's own formulas, entry by entry, on the gradients made anew."""
    make = {"riemannian": riemannian.precondition, "lora_pro": lora_pro.nearest}[rule]
    m = adapted()
    optimizer = METHODS["optimizer"][rule](m, 1e-2, 0.3)
    copies = {n: p.detach().clone() for n, p in lora.trainable(m).items() if "lora_" in n}
    first, second = ({n: 0 * p for n, p in copies.items()} for _ in range(2))
    for t in (1, 2, 3):
        m(**tiny.batch(m.config, seed=t)).loss.backward()
        for name, layer in lora.adapters(m).items():
            pair = [f"{name}.lora_A", f"{name}.lora_B"]
            grads = [layer.lora_A.grad, layer.lora_B.grad]
            made = make(*(copies[n] for n in pair), *grads, layer.scaling)
            for n, g in zip(pair, made, strict=True):
                first[n] = 0.9 * first[n] + 0.1 * g
                second[n] = 0.999 * second[n] + 0.001 * g * g
                root = (second[n] / (1 - 0.999**t)).sqrt() + 1e-8
                copies[n] = (1 - 3e-3) * copies[n] - 1e-2 * first[n] / (1 - 0.9**t) / root
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, expected in copies.items():
        torch.testing.assert_close(lora.trainable(m)[name].detach(), expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------- LoRA-RITE


def rite_by_hand(A, B, gradients, lr, decay=0.0):
    """LoRA-RITE over some steps with matrix functions of scipy's kind: no basis, no coordinates.

    Everything is kept in the space of the other factor: with N = Y (Y^T Y)^(-1/2), which is U times
    a rotation, moments are (n, m) and (m, m) matrices, and turning them is a projection U U^T.
    """
    A, B = A.clone(), B.clone()
    state = [
        [torch.zeros(len(z), len(y), dtype=F64), torch.zeros(len(y), len(y), dtype=F64)]
        for z, y in ((A.T, B), (B, A.T))
    ]
    for t, (gA, gB) in enumerate(gradients, 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (0.9, 0.999))
        found = []
        for Z, Y, g in ((A.T, B, gA.T), (B, A.T, gB)):
            plus = torch.linalg.pinv(Y)  # (r, m)
            full = g @ plus  # (n, m): the un-magnified gradient, times U^T
            rms = full.norm() / (len(g) * Y.shape[1]) ** 0.5
            found.append((Z, plus, Y @ plus, full * (rms <= 1)))
        norm = sum(full.square().sum() for *_, full in found) ** 0.5
        steps = []
        for (Z, plus, P, full), moments in zip(found, state, strict=True):
            full = full / max(1.0, norm)
            V = (1 - b2) * full.T @ full / len(full) + b2 * P @ moments[1] @ P
            w, Q = torch.linalg.eigh((V + V.T) / 2)
            root = Q / (w.clamp(min=0).sqrt() + 1e-6) @ Q.T @ P
            M = (1 - b1) * full @ root + b1 * moments[0] @ P
            moments[:] = M, V
            steps.append(Z - lr * (M @ plus.T + decay * Z))
        A, B = steps[0].T, steps[1]
    return A, B


def one_module(rate=3e-2, decay=0.0, r=3):
    m = tiny.adapted("bert", targets=("fc1",), r=r)
    for i in (1, 2):
        lora.adapters(m)[f"layers.{i}.fc1"].enabled = False
    return METHODS["optimizer"]["lora_rite"](m, rate, decay), m.layers[0].fc1


@pytest.mark.parametrize("scales", [(1e-3, 1e-2), (0.2, 5.0)])
def test_rite_by_hand_in_the_space_of_the_other_factor(scales):
    """Six steps; with the larger scales gradients are clipped, and of every second step 0."""
    optimizer, layer = one_module(decay=0.1)
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    rng, gradients = torch.Generator().manual_seed(1), []
    for step in range(6):
        pair = [scales[step % 2] * torch.randn(p.shape, generator=rng, dtype=F64) for p in (A, B)]
        gradients.append(pair)
        layer.lora_A.grad, layer.lora_B.grad = (g.clone() for g in pair)
        optimizer.step()
    expected = rite_by_hand(A, B, gradients, 3e-2, 0.1)
    torch.testing.assert_close(layer.lora_A.detach(), expected[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(layer.lora_B.detach(), expected[1], rtol=0, atol=1e-8)
    assert (expected[0] - A).abs().max() > 0.02


def test_rite_as_published():
    """Three steps; the numbers are of the authors' code, gkevinyen5418/LoRA-RITE at c9bb451."""

    def wave(p, t):
        return (torch.arange(p.numel(), dtype=F64) ** 2 + t).sin().view(p.shape)

    optimizer, layer = one_module(decay=0.1)
    factors = layer.lora_A, layer.lora_B
    for p, t in zip(factors, (0.5, 0.9), strict=True):
        p.data.copy_(wave(p, t))
    for t, scale in enumerate((0.02, 0.5, 0.1)):  # the second one is clipped
        for p in factors:
            p.grad = scale * wave(p, t)
        optimizer.step()
    A = [0.4586272435, -0.0102593185, -0.9557705881]
    B = [0.7561978282, 0.8917996902, -0.9210294219]
    assert layer.lora_A[:, 0].tolist() == pytest.approx(A, abs=1e-9)
    assert layer.lora_B[0].tolist() == pytest.approx(B, abs=1e-9)


def test_a_gradient_set_to_zero_is_left_out_of_the_norm_and_momentum_moves_on():
    optimizer, layer = one_module()
    layer.lora_A.grad, layer.lora_B.grad = torch.ones_like(layer.lora_A), 0 * layer.lora_B
    optimizer.step()
    g, _, _ = lora_rite.unmagnified(layer.lora_B.detach(), 1e4 * torch.ones(12, 3, dtype=F64))
    assert not g.any()
    before, second = layer.lora_A.detach().clone(), optimizer.state[layer.lora_A]["exp_avg_sq"]
    layer.lora_A.grad, layer.lora_B.grad = 1e4 * torch.ones_like(before), 0 * layer.lora_B
    optimizer.step()
    assert (layer.lora_A - before).abs().max() > 1e-3
    assert optimizer.state[layer.lora_A]["exp_avg_sq"].trace() < second.trace()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rite_with_fewer_tokens_than_r(dtype):
    """A gradient of rank 1 at r = 6: steps of both factors are finite, of rank 1, and not 0."""
    m = tiny.adapted("bert", targets=("fc1",), r=6, dtype=dtype)
    layer = m.layers[0].fc1
    optimizer = METHODS["optimizer"]["lora_rite"](m, 1e-2, 0.0)
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, generator=rng, dtype=dtype) for k in (12, 20))
    for _ in range(20):  # one token, always the same: G = y x^T
        A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        G = 1e-2 * torch.outer(y, x)
        layer.lora_A.grad, layer.lora_B.grad = layer.scaling * B.T @ G, layer.scaling * G @ A.T
        optimizer.step()
        step_A, step_B = layer.lora_A - A, layer.lora_B - B
        for step in (step_A, step_B):
            assert step.isfinite().all()
            values = torch.linalg.svdvals(step)
            assert values[0] > 1e-4 and values[1] < 1e-2 * values[0]
    loss = (layer.delta_w() * G).sum() - (layer.scaling * B @ A * G).sum()
    assert loss < 0


def test_rite_clips_by_the_norm_of_all_modules_together():
    """After one step V = g^T g / n of what is left: its trace is ||g||^2 / (n total^2)."""
    m = tiny.adapted("bert", targets=("fc1",), r=3)
    lora.adapters(m)["layers.2.fc1"].enabled = False
    optimizer = METHODS["optimizer"]["lora_rite"](m, 1e-2, 0.0)
    rng, norms = torch.Generator().manual_seed(0), {}
    for i in (0, 1):
        A, B = (m.layers[i].fc1.get_parameter(name) for name in ("lora_A", "lora_B"))
        A.grad, B.grad = (0.4 * torch.randn(p.shape, generator=rng, dtype=F64) for p in (A, B))
        # (Y^T Y)^(-1/2) takes the size of the other factor away, up to a rotation: same norm
        for p, grad, Y in ((A, A.grad.T, B), (B, B.grad, A.T)):
            values, vectors = torch.linalg.eigh((Y.T @ Y).detach())
            norms[p] = (grad @ vectors / values.sqrt()).norm().item()
    total = math.hypot(*norms.values())
    assert total > 1.2 * math.hypot(*list(norms.values())[:2])  # of one module alone
    optimizer.step()
    for p, norm in norms.items():
        rows = p.numel() // 3
        trace = optimizer.state[p]["exp_avg_sq"].trace().item()
        assert trace == pytest.approx((norm / total) ** 2 / rows, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rite_cuts_off_what_is_a_rank_by_rounding_alone(dtype):
    """B of rank 2 at r = 3, up to rounding: A moves, by about the rate, not by 1e7 of it."""
    m = tiny.adapted("bert", targets=("fc1",), r=3, dtype=dtype)
    layer, rng = m.layers[0].fc1, torch.Generator().manual_seed(0)
    with torch.no_grad():
        left, right = (torch.randn(x, generator=rng, dtype=dtype) for x in ((20, 2), (2, 3)))
        layer.lora_B.copy_(left @ right)
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    G = 1e-2 * torch.randn(20, 12, generator=rng, dtype=dtype)
    layer.lora_A.grad, layer.lora_B.grad = layer.scaling * B.T @ G, layer.scaling * G @ A.T
    METHODS["optimizer"]["lora_rite"](m, 1e-2, 0.0).step()
    assert 1e-4 < (layer.lora_A - A).abs().max() < 1


# --------------------------------------------------------------------------- (R A, B R^-1), and off


def plain_descent(model, transform):
    parameters = list(lora.trainable(model).values())
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def step():
        for A, B, s in plain.pairs(model):
            A.grad, B.grad = transform(A, B, A.grad, B.grad, s)
        torch.optim.SGD.step(optimizer)

    optimizer.step = torch.no_grad()(step)
    return optimizer


WAYS = {  # way -> (optimizer of a model, whether the step sees R)
    "riemannian, descent": (
        lambda m: plain_descent(m, lambda *x: riemannian.precondition(*x, delta=0.0)),
        False,
    ),
    "lora_rite": (lambda m: METHODS["optimizer"]["lora_rite"](m, 0.01, 0.1), False),
    "descent": (lambda m: plain_descent(m, lambda A, B, gA, gB, s: (gA, gB)), True),
    "adamw": (lambda m: plain.adamw(m, 0.01, 0.1), True),
    "loraplus": (lambda m: METHODS["optimizer"]["loraplus"](m, 0.01, 0.1), True),
}


@pytest.mark.parametrize("way", WAYS)
def test_which_steps_do_not_see_the_basis(way):
    """Four steps from (A, B) and from (R A, B R^-1), R no rotation: the same B A, or not."""
    make, sees = WAYS[way]
    one, other = adapted(), adapted(CHANGE)
    start = products(one)
    trained(one, make(one), 4)
    trained(other, make(other), 4)
    first, second = products(one), products(other)
    gap = max((first[n] - second[n]).abs().max().item() for n in first)
    # 1e-7: of the last block three tokens are read, and V is hardly of rank 3
    assert gap > 1e-3 if sees else gap < 1e-7
    assert max((first[n] - start[n]).abs().max().item() for n in first) > 1e-4


def test_lora_pros_e_does_not_see_the_basis():
    A, B, G, _, _, s = point()
    found = []
    for a, b in ((A, B), (CHANGE @ A, B @ torch.linalg.inv(CHANGE))):
        new_A, new_B = lora_pro.nearest(a, b, s * b.T @ G, s * G @ a.T, s)
        found.append(s * b @ new_A + s * new_B @ a)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_off_means_off_and_the_rest_is_adamw(rule):
    m, other = adapted(), adapted()
    off = m.layers[1].fc1
    off.enabled = other.layers[1].fc1.enabled = False
    before = [off.lora_A.detach().clone(), off.lora_B.detach().clone()]
    optimizer = METHODS["optimizer"][rule](m, 1e-2, 0.3)
    kept = {k: v.clone() for k, v in optimizer.state.get(off.lora_A, {}).items()}
    trained(m, optimizer, 1)
    assert torch.equal(off.lora_A, before[0]) and torch.equal(off.lora_B, before[1])
    after = optimizer.state.get(off.lora_A, {})
    assert all(torch.equal(after[k], kept[k]) for k in after)
    trained(other, plain.adamw(other, 1e-2, 0.3), 1)
    torch.testing.assert_close(m.classifier.weight, other.classifier.weight, rtol=0, atol=1e-14)
    assert not torch.equal(m.layers[0].fc1.lora_B, other.layers[0].fc1.lora_B)


# --------------------------------------------------------------------------------- which adapters


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", METHODS["adapter"])
def test_every_adapter_goes_with_a_rule_or_is_refused_by_name(name, rule):
    m = tiny.model("bert", dtype=torch.float32)
    lora.inject(m, ("q_proj", "k_proj", "v_proj"), r=3, adapter=METHODS["adapter"][name])
    lora.mark_trainable(m)
    argv = f"--adapter {name} --optimizer {rule} --allocate none".split()
    if f"--optimizer {rule}" in INCOMPATIBLE.get(name, {}):
        with pytest.raises(ValueError, match=f"--adapter {name} does not go with --optimizer"):
            parse_flags(argv)
        return
    parse_flags(argv)
    optimizer = METHODS["optimizer"][rule](m, 1e-2, 0.0)
    if rule == "loraplus":  # every part of a B, and nothing else, is fast
        [fast] = [g["params"] for g in optimizer.param_groups if g.get("lr_ratio", 1) == 16]
        parts = [p for n, p in lora.trainable(m).items() if n.rpartition(".lora_")[2][:1] == "B"]
        assert {id(p) for p in fast} == {id(p) for p in parts} and parts
    start = {n: p.detach().clone() for n, p in lora.trainable(m).items()}
    trained(m, optimizer, 2)
    moved = lora.trainable(m)
    assert all(p.isfinite().all() for p in moved.values())
    assert any(not torch.equal(moved[n], start[n]) for n in start if "lora_" in n)


def test_a_module_without_a_pair_is_refused():
    class FrozenA(lora.LoRALayer):
        def factors(self):
            return {"lora_B": self.lora_B}

    m = tiny.model("bert")
    lora.inject(m, ("fc1",), r=2, adapter=FrozenA)
    with pytest.raises(ValueError, match="fc1 does not train a pair A and B"):
        METHODS["optimizer"]["riemannian"](m, 1e-3, 0.0)
    first, second = m.layers[0].fc1, m.layers[1].fc1
    first.factors = second.factors = lambda: {"lora_A": first.lora_A, "lora_B": first.lora_B}
    with pytest.raises(ValueError, match=r"layers\.1\.fc1 shares"):
        METHODS["optimizer"]["lora_pro"](m, 1e-3, 0.0)


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def flags(tmp_path):
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 4 --epochs 2 --batch-size 5 --lr 0.01 "
        "--log-every 1 --device cpu --schedule constant --warmup 0 --weight-decay 0.1"
    )
    return text.split()


@pytest.fixture
def run_of(flags):
    return lambda rule: train.set_up(parse_flags([*flags, "--optimizer", rule]))


@pytest.mark.parametrize("rule", RULES)
def test_an_interrupted_run_ends_with_the_same_bits(flags, tmp_path, monkeypatch, rule):
    """With dynamic allocation: modules go off and return with their moments."""
    words = [*flags, "--optimizer", rule, "--every", "0.4", "--keep", "0.5"]
    whole_and_interrupted(words, tmp_path, monkeypatch, stop_after=4)


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_equal_one(flags, tmp_path, monkeypatch, rule):
    """In float64, the parameters after an epoch."""

    def run():
        r = train.set_up(parse_flags([*flags, "--optimizer", rule, "--allocate", "none"]))
        r.model.double()
        tiny.randomise([a.lora_B for a in lora.adapters(r.model).values()])
        r.optimizer = train.make_optimizer(r.model, r.args)
        for group in train.epoch_steps(r, 0):
            train.train_step(r, group, 0.01)
        return {n: p.detach() for n, p in lora.trainable(r.model).items()}

    alone, both = run(), in_processes(run, 2, tmp_path)
    for name, p in alone.items():
        torch.testing.assert_close(both[0][name], p, rtol=0, atol=1e-9)
        assert torch.equal(both[0][name], both[1][name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--optimizer lora_rite --allocate static --per-rank yes --budget-params 300",
            "no resuming with less",
        ),
        ("--optimizer lora_pro --per-rank yes --budget-params 300", "moments of its own"),
        (
            "--optimizer riemannian --targets none --shortcuts none --allocate none",
            "needs --targets",
        ),
        ("--optimizer lora_riet", "did you mean 'lora_rite'"),
    ],
)
def test_bad_input(words, message, capsys):
    assert train.main(words.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_rite_takes_the_rate_of_the_schedule():
    m = tiny.adapted("bert", targets=("fc1",))
    optimizer = METHODS["optimizer"]["lora_rite"](m, 1e-2, 0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = m.layers[0].fc1.lora_B.detach().clone()
    m(**tiny.batch(m.config)).loss.backward()
    optimizer.step()
    assert torch.equal(m.layers[0].fc1.lora_B, before)


def test_lora_pro_solves_in_float64_what_is_float32():
    """Two columns of B that are 1e-4 apart: in float32 the result is off by two thirds."""
    A, B, G, _, gB, s = point()
    B[:, 1] = B[:, 0] + 1e-4 * B[:, 1]
    given = A, B, s * B.T @ G, gB
    pairs = lora_pro.nearest(*given, s), lora_pro.nearest(*(x.float() for x in given), s)
    exact, found = (s * B @ a.double() + s * b.double() @ A for a, b in pairs)
    assert (found - exact).norm() < 1e-2 * exact.norm()
