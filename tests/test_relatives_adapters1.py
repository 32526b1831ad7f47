"""Relatives whose modules stand alone: DoRA, Asymmetry, LoRA-XS, SBoRA, PRoLoRA.

Each against a dense weight that is computed here from its definition, entry by entry where it can
be, in float64 at a generic point: every factor is random, alpha is not r, in is not out, examples
differ in length. Gradients come from the dense weight's, by the chain rule written out.
"""

import functools
import json

import pytest
import safetensors.torch
import torch
from torch.func import functional_call

import lora
import proxies
import tiny
import train
from relatives import METHODS
from relatives.dora import DoRA
from relatives.lora_xs import LoRAXS, singular_pair
from relatives.prolora import PRoLoRA
from relatives.sbora import distinct
from support.flags import equal_budget_control, parse_flags
from test_train import whole_and_interrupted
from tools.peft import writing

KINDS = ("dora", "asymmetry", "lora_xs", "sbora_fa", "sbora_fb", "prolora")
S = 5 / 3  # alpha / r; r is 4, so that of 3 shared ranks a roll and its reverse differ


def inject(kind, family="bert", seed=0, targets=lora.LINEARS, shortcuts=(), r=4):
    """(model as it starts, its modules)."""
    m = tiny.model(family)
    adapter = METHODS["adapter"][kind] if isinstance(kind, str) else kind
    lora.inject(m, targets, r=r, lora_alpha=S * r, adapter=adapter, seed=seed, shortcuts=shortcuts)
    lora.mark_trainable(m)
    return m, lora.adapters(m)


def generic(kind, family="bert", **more):
    """The same, with every factor random."""
    m, layers = inject(kind, family, **more)
    tiny.randomise([f for a in layers.values() for f in a.factors().values()], seed=8, std=0.5)
    return m, layers


def linear(n_in=6, n_out=8, seed=3, rank=None):
    """A frozen nn.Linear with random weights, of a rank."""
    base = torch.nn.Linear(n_in, n_out).double().requires_grad_(False)
    tiny.randomise(base.parameters(), seed)
    if rank:
        U, s, Vh = torch.linalg.svd(base.weight)
        base.weight.copy_(U[:, :rank] * s[:rank] @ Vh[:rank])
    return base


def layer_of(kind, n_in=6, n_out=8, r=3, **more):
    rng = torch.Generator().manual_seed(1)
    return kind(linear(n_in, n_out), n_in, n_out, r, 5, generator=rng, **more).double()


def chunk_row(k, j, ranks, x):
    """The row of the chunk that stands in row k of copy j."""
    return (k + j * max(1, ranks // x)) % ranks


def dense(layer):
    """The weight that a module computes with, by its definition, (out, in); no product of ours."""
    W = layer.base.weight.detach().clone()
    f = {key: p.detach() for key, p in layer.factors().items()}
    kind = next(k for k in KINDS if METHODS["adapter"][k] is type(layer))
    n_out, n_in = W.shape
    if kind == "lora_xs":
        # S_r V_r^T = U_r^T W, with U_r the eigenvectors of W W^T
        values, vectors = torch.linalg.eigh(W @ W.T)
        U = vectors[:, values.argsort(descending=True)[: layer.r]]
        for k in range(layer.r):
            U[:, k] *= U[U[:, k].abs().argmax(), k].sign()
        return W + S * torch.einsum("ik,kl,jl,jn->in", U, f["lora_R"], U, W)
    if kind == "sbora_fa":
        for k, column in enumerate(layer.lora_index.tolist()):
            W[:, column] += S * f["lora_B"][:, k]
        return W
    if kind == "sbora_fb":
        for k, row in enumerate(layer.lora_index.tolist()):
            W[row] += S * f["lora_A"][k]
        return W
    if kind == "prolora":
        u, x = len(f["lora_A_own"]), 4
        shared = layer.r - u
        A, B = W.new_zeros(layer.r, n_in), W.new_zeros(n_out, layer.r)
        for k in range(shared):
            for c in range(n_in):
                j, within = divmod(c, n_in // x)
                A[k, c] = f["lora_A_shared"][chunk_row(k, j, shared, x), within]
            for c in range(n_out):
                j, within = divmod(c, n_out // x)
                B[c, k] = f["lora_B_shared"][within, chunk_row(k, j, shared, x)]
        A[shared:], B[:, shared:] = f["lora_A_own"], f["lora_B_own"]
        return W + S * torch.einsum("ok,ki->oi", B, A)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    V = W + S * sum(torch.outer(B[:, k], A[k]) for k in range(layer.r))
    if kind == "asymmetry":
        return V
    for i, m in enumerate(f["lora_magnitude"].tolist()):
        V[i] *= m / sum(v * v for v in V[i].tolist()) ** 0.5
    return V


def through_dense(m, batch):
    """(logits, {module: dL/dW'}) of the plain model with the dense weights in its places."""
    plain = tiny.model(m.config.family)
    weights = {n: dense(a).requires_grad_(True) for n, a in lora.adapters(m).items()}
    state = {n.replace(".base.", "."): p.detach() for n, p in m.named_parameters()}
    state = {n: p for n, p in state.items() if ".lora_" not in n}
    out = functional_call(
        plain, {**state, **{f"{n}.weight": w for n, w in weights.items()}}, (), batch
    )
    return out.logits, dict(
        zip(weights, torch.autograd.grad(out.loss, weights.values()), strict=True)
    )


def expected_gradients(layer, G):
    """dL/dfactor from G = dL/dW' by the chain rule, the norm of DoRA held constant."""
    f = {key: p.detach() for key, p in layer.factors().items()}
    if isinstance(layer, LoRAXS):
        return {"lora_R": S * layer.lora_B.T @ G @ layer.lora_A.T}
    if hasattr(layer, "lora_index"):
        index = layer.lora_index.tolist()
        return {k: S * (G[:, index] if k == "lora_B" else G[index]) for k in f}
    if isinstance(layer, PRoLoRA):
        u, x = len(f["lora_A_own"]), 4
        shared, (n_out, n_in) = layer.r - u, G.shape
        A, B = (t.detach() for t in layer.branch())
        gA, gB = S * B.T @ G, S * G @ A.T  # of the whole factors
        found = {"lora_A_own": gA[shared:], "lora_B_own": gB[:, shared:]}
        sums = torch.zeros_like(f["lora_A_shared"]), torch.zeros_like(f["lora_B_shared"])
        for k in range(shared):
            for c in range(n_in):
                j, within = divmod(c, n_in // x)
                sums[0][chunk_row(k, j, shared, x), within] += gA[k, c]
            for c in range(n_out):
                j, within = divmod(c, n_out // x)
                sums[1][within, chunk_row(k, j, shared, x)] += gB[c, k]
        return {**found, "lora_A_shared": sums[0], "lora_B_shared": sums[1]}
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if isinstance(layer, DoRA):
        V = layer.base.weight + S * B @ A
        norm = V.square().sum(1).sqrt()
        found = {"lora_magnitude": (G * V).sum(1) / norm}
        G = G * (f["lora_magnitude"] / norm)[:, None]
        return {**found, "lora_A": S * B.T @ G, "lora_B": S * G @ A.T}
    return {"lora_B": S * G @ A.T}


# -------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_scores_equal_the_dense_definition(kind, family):
    m, layers = generic(kind, family)
    batch = tiny.batch(m.config)
    out = m(**batch)
    logits, G = through_dense(m, batch)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-10)
    assert (logits - tiny.model(family)(**batch).logits).abs().max() > 1e-2
    out.loss.backward()
    grad_norm, snip = (proxies.score(p, m, [batch]) for p in ("grad_norm", "snip"))
    for name, layer in layers.items():
        expected = expected_gradients(layer, G[name])
        assert set(expected) == set(layer.factors())
        for key, factor in layer.factors().items():
            torch.testing.assert_close(factor.grad, expected[key], rtol=0, atol=1e-10)
        others = [p for n, p in layer.named_parameters() if n not in expected]
        assert all(p.grad is None for p in others)
        norms = sum(e.norm().item() for e in expected.values())
        assert grad_norm[name] == pytest.approx(norms, abs=1e-10)
        products = sum((f * expected[k]).abs().sum().item() for k, f in layer.factors().items())
        assert snip[name] == pytest.approx(products, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_model_is_the_pretrained_one(kind):
    m, layers = inject(kind)
    batch = tiny.batch(m.config)
    moved = (m(**batch).logits - tiny.model("bert")(**batch).logits).abs().max()
    assert 0 < moved < 1e-3 if kind == "lora_xs" else moved < 1e-12
    again = inject(kind, targets=("fc2",))[1]["layers.2.fc2"]  # of (seed, name) alone
    other = inject(kind, seed=1)[1]["layers.2.fc2"]
    first = layers["layers.2.fc2"]
    assert all(
        torch.equal(p, q)
        for p, q in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert any(
        not torch.equal(p, q)
        for p, q in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_computes_the_same_and_comes_back_bit_for_bit(kind):
    m, layers = generic(kind, shortcuts=("residual_1",))
    layers["layers.1.fc1"].enabled = False
    batch = tiny.batch(m.config)
    before, weights = (
        m(**batch).logits,
        {
            n: a.base.weight.clone()
            for n, a in layers.items()
            if isinstance(a.base, torch.nn.Linear)
        },
    )
    deltas = {n: layers[n].delta_w() for n in weights}
    assert len(lora.merge(m)) == len(weights) - 1
    torch.testing.assert_close(m(**batch).logits, before, rtol=0, atol=1e-11)
    for name, layer in layers.items():
        if layer.merged and kind == "dora":
            norms = layer.base.weight.norm(dim=1)
            torch.testing.assert_close(norms, layer.lora_magnitude.abs(), rtol=0, atol=1e-11)
        if layer.merged:
            torch.testing.assert_close(layer.delta_w(), deltas[name], rtol=0, atol=1e-12)
    lora.unmerge(m)
    assert all(torch.equal(layers[n].base.weight, w) for n, w in weights.items())
    assert torch.equal(m(**batch).logits, before)


@pytest.mark.parametrize("when_off", ["out", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_off_gets_no_gradient(kind, when_off):
    m, layers = generic(kind)
    batch = tiny.batch(m.config)
    whole = m(**batch).logits
    off = layers["layers.0.fc1"]
    off.enabled, off.when_off = False, when_off
    out = m(**batch)
    out.loss.backward()
    assert all(f.grad is None for f in off.factors().values())
    assert all(f.grad is not None for f in layers["layers.0.fc2"].factors().values())
    moved = (out.logits - whole).abs().max()
    assert moved == 0 if when_off == "frozen" else moved > 1e-5
    if when_off == "out":
        x = torch.randn(2, 4, 12, dtype=torch.float64)
        assert torch.equal(off(x), off.base(x))


def test_parameters_are_counted_exactly():
    """fc1 of the tiny BERT is 12 -> 20, r is 3, u is 1, x is 4."""
    expected = {
        "dora": 3 * (12 + 20) + 20,
        "asymmetry": 3 * 20,
        "lora_xs": 9,
        "sbora_fa": 3 * 20,
        "sbora_fb": 3 * 12,
        "prolora": (12 + 20) + 2 * (3 + 5),
    }
    for kind, count in expected.items():
        m, layers = inject(kind, targets=("fc1",), r=3)
        assert lora.count_trainable(m)["layers.0.fc1"] == count
        layers["layers.0.fc1"].enabled = False
        stored = lora.count_trainable(m, stored=True).get("layers.0.fc1")
        assert stored == (9 if kind == "lora_xs" else None)  # R is not zero at the start
        tiny.randomise(layers["layers.0.fc1"].factors().values())
        assert lora.count_trainable(m, stored=True)["layers.0.fc1"] == count
        assert "layers.0.fc1" not in lora.count_trainable(m)


# ------------------------------------------------------------------------------------- one by one


def test_dora_weight_has_the_trained_norms_and_is_blind_to_the_scale_of_v():
    """Rows of V times positive numbers: the same weight. m = ||V||: plain LoRA."""
    layer = layer_of(DoRA)
    tiny.randomise(layer.factors().values(), 4)
    weight = layer.base.weight + layer.delta_w()
    torch.testing.assert_close(weight.norm(dim=1), layer.lora_magnitude.abs())
    c = torch.linspace(0.5, 3, 8, dtype=torch.float64)[:, None]
    with torch.no_grad():
        layer.base.weight *= c
        layer.lora_B *= c
    torch.testing.assert_close(layer.base.weight + layer.delta_w(), weight)
    V = layer.base.weight + S * layer.lora_B @ layer.lora_A
    layer.lora_magnitude.data = V.norm(dim=1).detach()
    torch.testing.assert_close(layer.delta_w(), S * layer.lora_B @ layer.lora_A)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_on_all_that_is_added(kind):
    layer = layer_of(METHODS["adapter"][kind], 12, 20, lora_dropout=0.5)
    tiny.randomise(layer.factors().values(), 4)
    x = torch.randn(1000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(5)
    expected = layer.base(x) + dropped @ layer.delta_w().T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + x @ layer.delta_w().T)


def test_asymmetry_is_a_linear_model_in_b():
    """A A^T = I; ΔW stays in A's row space; the least-squares B has gradient zero."""
    layer = layer_of(METHODS["adapter"]["asymmetry"])
    A = layer.lora_A.detach()
    torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    rng = torch.Generator().manual_seed(2)
    x, y = (torch.randn(30, n, dtype=torch.float64, generator=rng) for n in (6, 8))
    rest = y - layer.base(x)
    layer.lora_B.data = torch.linalg.lstsq(S * x @ A.T, rest).solution.T.contiguous()
    (layer(x) - y).square().sum().backward()
    assert layer.lora_B.grad.abs().max() < 1e-10 and layer.lora_A.grad is None
    null = torch.linalg.svd(A).Vh[3:]  # orthogonal to A's rows
    assert (layer.delta_w() @ null.T).abs().max() < 1e-12 < layer.delta_w().abs().max()


def test_lora_xs_is_the_best_approximation_at_r_identity():
    """Eckart-Young: no matrix of rank r is nearer than the root of the rest's squares."""
    layer = layer_of(LoRAXS)
    layer.scaling, layer.lora_R.data = 1.0, torch.eye(3, dtype=torch.float64)
    W, B = layer.base.weight, layer.lora_B
    rest = torch.linalg.eigvalsh(W.T @ W).flip(0)[3:].sum().sqrt()
    assert (W - layer.delta_w()).norm().item() == pytest.approx(rest.item(), abs=1e-10)
    torch.testing.assert_close(B.T @ B, torch.eye(3, dtype=torch.float64))
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


def test_lora_xs_start_has_the_deviation_of_the_paper():
    rng = torch.Generator().manual_seed(0)
    big = LoRAXS(linear(60, 64), 60, 64, 50, generator=rng)
    assert big.lora_R.std().item() == pytest.approx(1e-5, rel=0.05)
    assert abs(big.lora_R.mean().item()) < 1e-6


def test_sbora_is_training_columns_or_rows_themselves():
    """SGD on the factor = SGD on those columns or rows of W with the rate times scaling^2."""
    for kind, axis in (("sbora_fa", 1), ("sbora_fb", 0)):
        layer = layer_of(METHODS["adapter"][kind])
        index = layer.lora_index.tolist()
        assert len(set(index)) == 3 and max(index) < (6, 8)[1 - axis]
        W = layer.base.weight.clone().requires_grad_(True)
        [factor] = layer.factors().values()
        x, y = (torch.randn(20, n, dtype=torch.float64) for n in (6, 8))
        for _ in range(3):
            (layer(x) - y).square().mean().backward()
            (torch.nn.functional.linear(x, W, layer.base.bias) - y).square().mean().backward()
            with torch.no_grad():
                factor -= 0.1 * factor.grad
                step = torch.zeros_like(W).index_copy(
                    axis, layer.lora_index, W.grad.index_select(axis, layer.lora_index)
                )
                W -= 0.1 * S**2 * step
            factor.grad = W.grad = None
        delta = layer.delta_w()
        torch.testing.assert_close(layer.base.weight + delta, W)
        changed = delta.abs().amax(1 - axis).nonzero().flatten().tolist()
        assert changed == sorted(index)


def test_sbora_gather_equals_the_product_with_the_identity():
    assert distinct(5, 5, torch.Generator()).tolist() == [0, 1, 2, 3, 4]
    for kind in ("sbora_fa", "sbora_fb"):
        layer = layer_of(METHODS["adapter"][kind])
        tiny.randomise(layer.factors().values(), 4)
        x = torch.randn(2, 5, 6, dtype=torch.float64)
        A, B = layer.branch()
        torch.testing.assert_close(layer(x), layer.base(x) + S * x @ A.T @ B.T)


def test_prolora_blocks_depend_on_the_rotation_alone():
    """u = 0, r = 8, x = 4 and 4: block (i, j) by (2 i - 2 j) mod 8, so 4 different of 16."""
    layer = layer_of(PRoLoRA, 16, 12, 8, unshared_r=0)
    tiny.randomise(layer.factors().values(), 4)
    blocks = layer.delta_w().detach().reshape(4, 3, 4, 4).transpose(1, 2)  # [i, j] (3, 4)
    for i in range(4):
        for j in range(4):
            torch.testing.assert_close(blocks[i, j], blocks[(i - j) % 4, 0])
            assert i == j or not torch.allclose(blocks[i, j], blocks[0, 0])


def test_prolora_bound_is_rectified_and_its_plain_cases_are_lora():
    """The chunk is drawn by the whole fan-in: within 1/sqrt(64), where its own is 1/sqrt(16)."""
    layer = layer_of(PRoLoRA, 64, 12, 8)
    assert 0.9 / 8 < layer.lora_A_shared.abs().max() < 1 / 8
    assert 0.9 / 8 < layer.lora_A_own.abs().max() < 1 / 8
    for plain in (dict(x_A=1, x_B=1), dict(unshared_r=3)):
        layer, twin = layer_of(PRoLoRA, 8, 8, **plain), layer_of(lora.LoRALayer, 8, 8)
        assert torch.equal(layer.branch()[0], twin.lora_A) and layer.branch()[1].eq(0).all()
        tiny.randomise(layer.factors().values(), 4)
        A, B = layer.branch()
        twin.lora_A.data, twin.lora_B.data = A.detach(), B.detach()
        x = torch.randn(5, 8, dtype=torch.float64)
        assert torch.equal(layer(x), twin(x))
        assert sum(f.numel() for f in layer.factors().values()) == 3 * 16


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_file_loads_as_plain_lora_where_that_is_equal(kind, tmp_path):
    m, layers = generic(kind, shortcuts=("residual_1",))
    layers["layers.1.fc1"].enabled = False
    lora.save_adapter(m, tmp_path)
    with safetensors.safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        about = json.loads(file.metadata()["adapters"])
        keys = {key.rpartition(".")[2] for key in file.keys() if ".lora_" in key}  # noqa: SIM118
    more = {"lora_magnitude"} if kind == "dora" else set()
    assert keys == {"lora_A", "lora_B"} | more
    assert {a.get("kind") for n, a in about.items() if "residual" not in n} == {
        "dora" if more else None
    }
    fresh = tiny.model("bert")
    if kind == "dora":
        with pytest.raises(ValueError, match="holds dora"):
            lora.load_adapter(fresh, tmp_path)
        assert not lora.adapters(fresh)
    got = lora.load_adapter(fresh, tmp_path, **({"adapter": DoRA} if more else {}))
    batch = tiny.batch(m.config)
    torch.testing.assert_close(fresh(**batch).logits, m(**batch).logits, rtol=0, atol=1e-11)
    assert not got["layers.1.fc1"].enabled
    assert (type(got["layers.0.fc1"]) is DoRA) == bool(more)
    got["layers.1.fc1"].enabled = layers["layers.1.fc1"].enabled = True  # kept for its return
    torch.testing.assert_close(fresh(**batch).logits, m(**batch).logits, rtol=0, atol=1e-11)


def test_a_dora_file_without_its_magnitude_is_refused(tmp_path):
    m, _ = generic("dora", targets=("fc1",))
    tensors = {n: p.detach() for n, p in lora.trainable(m).items()}
    lora.save_adapter(m, tmp_path)
    path = tmp_path / "adapter.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    del tensors["layers.0.fc1.lora_magnitude"]
    safetensors.torch.save_file(tensors, path, about)
    with pytest.raises(ValueError, match=r"layers\.0\.fc1\.lora_magnitude is missing"):
        lora.load_adapter(tiny.model("bert"), path, DoRA)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_carries_all_of_it(kind):
    m, _ = generic(kind)
    other, _ = inject(kind, seed=1)
    other.load_state_dict(m.state_dict())
    batch = tiny.batch(m.config)
    assert torch.equal(other(**batch).logits, m(**batch).logits)


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def flags(tmp_path):
    model = tiny.bert_folder(tmp_path / "model")
    task = tiny.task_folder(tmp_path / "task")
    text = (
        f"--task mrpc --data-dir {task} --model {model} --r 3 --epochs 2 --batch-size 5 --lr 0.03 "
        "--log-every 1 --device cpu --schedule constant --warmup 0 --every 0.4 --weight-decay 0.3 "
        "--targets q_proj,v_proj,fc1 --allocate dynamic --keep 0.5"
    )
    return text.split()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_dynamic_allocation_resumes_to_the_bits_and_exports(
    kind, flags, tmp_path, monkeypatch
):
    """Decisions at 0.4 and 0.8 of each epoch; frozen draws come back as they were."""
    shortcuts = ["--shortcuts", "none" if kind == "dora" else "residual", "--lora-dropout", "0.2"]
    chosen = [*flags, "--adapter", kind, *shortcuts]
    whole, broken = whole_and_interrupted(chosen, tmp_path, monkeypatch, 3)
    first, second = ((f / "adapter.safetensors").read_bytes() for f in (whole, broken))
    assert first == second
    config = writing.export(whole, tmp_path / "peft", keep_shortcuts=True)
    assert config.get("use_dora", False) == (kind == "dora")


def test_a_budget_in_parameters_is_kept_exactly(flags, tmp_path, capsys):
    """fc1 costs 3 * 32 + 20, q and v 3 * 24 + 12; and there is no equal budget at another r."""
    at = flags.index("--keep")
    budget = [*flags[:at], *flags[at + 2 :], "--allocate", "static", "--shortcuts", "none"]
    del budget[budget.index("--every") : budget.index("--every") + 2]
    out = tmp_path / "run"
    command = [*budget, "--adapter", "dora", "--budget-params", "290", "--out", str(out)]
    assert train.main(command) == 0
    assert f"{116 + 2 * 84} in adapters" in capsys.readouterr().out
    args = parse_flags(["--adapter", "dora"])
    assert equal_budget_control(args, 290, {"a": 116}) is None


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        *((kind, "--delta-ratio 1", "does not go with --delta-ratio") for kind in KINDS),
        *(
            (kind, "--per-rank yes --budget-params 9 --proxy snip", "--per-rank yes")
            for kind in KINDS
        ),
        *(
            (kind, "--proxy fisher", "--proxy fisher")
            for kind in ("asymmetry", "lora_xs", "sbora_fa", "prolora")
        ),
        ("dora", "--targets none", "needs --targets"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(kind, more, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_flags(["--adapter", kind, *more.split()])
    assert "\n" not in str(error.value) and ": " in str(error.value)


def test_fisher_works_where_a_row_of_a_trains_and_says_where_not():
    for kind in ("dora", "sbora_fb"):
        m, layers = generic(kind, targets=("fc1",))
        batch = tiny.batch(m.config)
        scores = proxies.score("fisher", m, [batch])
        m.eval()
        A, total = layers["layers.0.fc1"].lora_A, 0.0
        for i in range(3):
            m.zero_grad()
            m(**{k: v[i : i + 1] for k, v in batch.items()}).loss.backward()
            total += sum(torch.dot(A.grad[k], A.detach()[k]).item() ** 2 for k in range(4))
        assert scores["layers.0.fc1"] == pytest.approx(total / 6, rel=1e-9)
    with pytest.raises(ValueError, match=r"fisher needs a lora_A that trains: layers\.0\.fc1"):
        proxies.score("fisher", inject("sbora_fa", targets=("fc1",))[0], [batch])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (functools.partial(PRoLoRA, unshared_r=4), "unshared_r is 4, allowed: 0 to r, which is 3"),
        (functools.partial(PRoLoRA, x_A=5), "5 copies of a chunk do not make 12 in_features"),
        (functools.partial(PRoLoRA, x_B=0), "0 copies of a chunk do not make 12 out_features"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(adapter, message):
    with pytest.raises(ValueError, match=message):
        layer_of(adapter, 12, 12)


def test_weights_that_a_method_cannot_take_end_with_exit_code_2(flags, tmp_path, capsys):
    """A weight of rank 1 for LoRA-XS, a row of zeros for DoRA: one line, and no run folder."""
    tensors = tiny.bert_tensors()
    name = "bert.encoder.layer.1.attention.self.query.weight"
    tensors[name] = torch.outer(torch.arange(12.0), torch.ones(12))  # row 0 is zero
    tiny.bert_folder(tmp_path / "model", tensors)
    for kind, message in (("lora_xs", "r is 3, and a weight has rank 1"), ("dora", "row 0 of")):
        assert train.main([*flags, "--adapter", kind, "--out", str(tmp_path / kind)]) == 2
        printed = capsys.readouterr().err.strip()
        assert message in printed and len(printed.splitlines()) == 1
        assert not (tmp_path / kind).exists()


def test_singular_pair_of_a_weight_of_low_rank():
    weight = linear(rank=2).weight
    B, A = singular_pair(weight, 2)
    torch.testing.assert_close(B @ A, weight)
    with pytest.raises(ValueError, match="r is 3, and a weight has rank 2"):
        singular_pair(weight, 3)


def test_dora_that_peft_cannot_hold_is_refused_by_name():
    """One magnitude too few for GPT-2's c_attn; a shortcut beside it."""
    A, B, m = torch.ones(2, 4), torch.ones(4, 2), torch.ones(4)
    dora, plain = writing.Pair(A, B, 1.0, m), writing.Pair(A, B, 1.0)
    with pytest.raises(ValueError, match="train with q_proj, k_proj and v_proj all on"):
        writing.peft_files({"layers.0.q_proj": dora, "layers.0.v_proj": dora}, {}, "gpt2", "x")
    with pytest.raises(ValueError, match="train DoRA with --shortcuts none"):
        writing.peft_files({"layers.0.fc1": dora, "layers.0.residual_1": plain}, {}, "bert", "x")


def test_a_file_that_gives_a_shortcut_a_kind_of_its_own(tmp_path):
    """Only a linear layer has a weight whose direction and length come apart."""
    m, _ = generic("dora", targets=("q_proj",), shortcuts=("residual_1",))
    path = tmp_path / "a.safetensors"
    lora.save_adapter(m, path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["adapters"])
    about["layers.0.residual_1"]["kind"] = "dora"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"adapters": json.dumps(about)})
    with pytest.raises(ValueError, match="residual_1 is dora: a shortcut is a LoRA pair"):
        lora.load_adapter(tiny.model("bert"), path, adapter=DoRA)
