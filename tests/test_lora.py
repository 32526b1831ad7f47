"""lora.py against dense matrices, closed forms and bit-for-bit round trips."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import dense
import lora
import tiny
from relatives import METHODS
from relatives.single_ranks import keep_ranks
from relatives.triplets import AdaLoRALayer
from support import adapter_file, seeds


def generic_layer(dropout=0.0):
    rng = torch.Generator().manual_seed(0)
    layer = lora.LoRALayer(nn.Linear(7, 5).double(), 7, 5, 3, 4, dropout, rng)
    tiny.randomise(layer.parameters(), 1)
    return layer, torch.randn(2, 6, 7, dtype=torch.float64, generator=rng)


def test_forward_and_gradients_in_closed_form():
    """h = W x + s B A x; with g = dL/dh: dL/dB = s g^T (x A^T), dL/dA = s (g B)^T x, s = 4 / 3."""
    layer, x = generic_layer()
    a, b, w = layer.lora_A.detach(), layer.lora_B.detach(), layer.base.weight.detach()
    expected = torch.empty(2, 6, 5, dtype=torch.float64)
    for i in range(2):
        for t in range(6):
            expected[i, t] = w @ x[i, t] + 4 / 3 * (b @ (a @ x[i, t])) + layer.base.bias.detach()
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    g = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    (out * g).sum().backward()
    flat, gradient = x.reshape(12, 7), g.reshape(12, 5)
    dw = gradient.T @ flat  # (5, 7) = dL/dW
    torch.testing.assert_close(layer.lora_B.grad, 4 / 3 * dw @ a.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.lora_A.grad, 4 / 3 * b.T @ dw, rtol=0, atol=1e-12)


def test_delta_w_entry_by_entry():
    layer, _ = generic_layer()
    for o in range(5):
        for i in range(7):
            entry = sum(layer.lora_B[o, k] * layer.lora_A[k, i] for k in range(3)) * 4 / 3
            assert layer.delta_w()[o, i].item() == pytest.approx(entry.item(), abs=1e-14)


def test_the_pair_is_the_change_at_scale_1_and_a_layer_says_what_it_is():
    layer, _ = generic_layer()
    A, B = layer.pair()
    assert A.shape == (3, 7) and not (A.requires_grad or B.requires_grad)
    expected = 4 / 3 * torch.einsum("ok,ki->oi", layer.lora_B, layer.lora_A).detach()
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-14)
    assert "r=3, lora_alpha=4, lora_dropout=0.0" in repr(layer)


def test_initial_values():
    """A is uniform in ±1/sqrt(in) (fan-in, not fan-out), B is zero, the output is the base's."""
    base = nn.Linear(400, 20)
    layer = lora.LoRALayer(base, 400, 20, 8, 16, generator=torch.Generator().manual_seed(0))
    a = layer.lora_A.detach()
    assert a.shape == (8, 400) and layer.lora_B.shape == (20, 8)
    assert a.abs().max() <= 400**-0.5
    assert a.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.03)
    assert abs(a.mean().item()) < 0.05 * 400**-0.5
    reference = torch.empty(8, 400)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert reference.std().item() == pytest.approx(a.std().item(), rel=0.05)
    assert not layer.lora_B.any()
    x = torch.randn(2, 400)
    assert torch.equal(layer(x), base(x))


def test_initial_a_depends_on_seed_and_name_alone():
    """Not on what else is adapted, the rank, the dtype or the global generator."""
    torch.manual_seed(1)
    first = lora.inject(tiny.model("bert"), lora.LINEARS, r=5, seed=3)
    torch.manual_seed(2)
    second = lora.inject(
        tiny.model("bert", dtype=torch.float32),
        ("v_proj",),
        r=2,
        shortcuts=("shortcut_sa",),
        seed=3,
    )
    for i in range(3):
        name = f"layers.{i}.v_proj"
        assert torch.equal(first[name].lora_A[:2].float(), second[name].lora_A)
    torch.set_default_dtype(torch.float64)
    try:
        third = lora.inject(tiny.model("bert"), ("v_proj",), r=5, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, layer in third.items():
        assert torch.equal(layer.lora_A, first[name].lora_A)
    assert not torch.equal(first["layers.0.v_proj"].lora_A, first["layers.1.v_proj"].lora_A)
    assert not torch.equal(first["layers.0.v_proj"].lora_A, first["layers.0.q_proj"].lora_A)
    other = lora.inject(tiny.model("bert"), ("v_proj",), r=5, seed=4)
    assert not torch.equal(first["layers.0.v_proj"].lora_A, other["layers.0.v_proj"].lora_A)


def test_generators_differ_by_seed_and_name():
    draws = {
        torch.rand(1, generator=seeds.generator(seed, name)).item()
        for seed in (0, 1)
        for name in ("head", "order/0", "order/1")
    }
    assert len(draws) == 6


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapted_model_equals_dense_matrices(family):
    m = tiny.adapted(family)
    batch = tiny.batch(m.config)
    torch.testing.assert_close(m(**batch).logits, dense.logits(m, batch), rtol=0, atol=1e-12)
    plain = tiny.model(family)
    assert (m(**batch).logits - plain(**batch).logits).abs().max() > 1e-3


def test_adapters_have_a_fixed_order():
    m = tiny.adapted("bert", targets=("fc1", "q_proj"), shortcuts=("shortcut_ffn", "residual_2"))
    layers = [
        [f"layers.{i}.{p}" for p in ("q_proj", "fc1", "residual_2", "shortcut_ffn")]
        for i in range(3)
    ]
    layers[0].remove("layers.0.shortcut_ffn")  # no block stands before the first
    assert list(lora.adapters(m)) == [name for names in layers for name in names]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("q",)}, "unknown target 'q', allowed: q_proj, k_proj"),
        ({"shortcuts": ("fc1",)}, "unknown target 'fc1', allowed: residual_1"),
        ({"targets": ()}, "nothing to adapt"),
        ({"r": 0}, "r is 0, allowed: an integer from 1 to 12"),
        ({"r": 13}, "r is 13, allowed: an integer from 1 to 12"),
        ({"r": 2.0}, "r is 2.0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_injection_is_refused_and_leaves_the_model(arguments, message):
    m = tiny.model("bert")
    with pytest.raises(ValueError, match=message):
        lora.inject(m, **arguments)
    assert not lora.adapters(m)


def test_rank_equal_to_the_layer_is_allowed():
    m = tiny.model("bert")
    lora.inject(m, r=12)
    assert lora.adapters(m)["layers.0.q_proj"].lora_A.shape == (12, 12)


def test_injecting_twice_is_refused():
    m = tiny.adapted("bert")
    with pytest.raises(ValueError, match="has LoRA modules already"):
        lora.inject(m)


def test_trainable_set_and_counts():
    """Adapters and head, exactly; a pooler that the checkpoint brought is not head."""
    m = tiny.model("bert")
    lora.inject(m, ("q_proj", "fc1"), r=3)
    m.head = ("classifier",)
    counts = lora.mark_trainable(m)
    names = {n for n, p in m.named_parameters() if p.requires_grad}
    pairs = {f"layers.{i}.{p}.lora_{x}" for i in range(3) for p in ("q_proj", "fc1") for x in "AB"}
    assert names == pairs | {"classifier.weight", "classifier.bias"}
    assert counts == {
        **{
            f"layers.{i}.{p}": 3 * (12 + n)
            for i in range(3)
            for p, n in (("q_proj", 12), ("fc1", 20))
        },
        "classifier": 12 * 3 + 3,
    }
    assert sum(counts.values()) == sum(p.numel() for p in m.parameters() if p.requires_grad)
    lora.adapters(m)["layers.1.fc1"].enabled = False
    assert "layers.1.fc1" not in lora.count_trainable(m)


def test_off_means_off():
    """A module that is off is its base: no branch, no gradient."""
    m = tiny.adapted("gpt2")
    batch = tiny.batch(m.config)
    for layer in lora.adapters(m).values():
        layer.enabled = False
    out = m(**batch)
    assert torch.equal(out.logits, tiny.model("gpt2")(**batch).logits)
    out.loss.backward()
    assert all(p.grad is None for a in lora.adapters(m).values() for p in (a.lora_A, a.lora_B))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merge_keeps_the_logits_and_unmerge_the_bits(family):
    m = tiny.adapted(family, shortcuts=("residual_1", "shortcut_ffn"))
    batch, layers = tiny.batch(m.config), lora.adapters(m)
    layers["layers.1.fc2"].enabled = False
    before = {n: p.clone() for n, p in m.named_parameters()}
    unmerged = m(**batch).logits
    merged = lora.merge(m)
    expected = {n for n in layers if n.rsplit(".")[-1] in lora.LINEARS} - {"layers.1.fc2"}
    assert set(merged) == expected
    torch.testing.assert_close(m(**batch).logits, unmerged, rtol=0, atol=1e-12)
    for name in merged:
        assert not torch.equal(layers[name].base.weight, before[f"{name}.base.weight"])
    lora.unmerge(m)
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())
    assert torch.equal(m(**batch).logits, unmerged)


def test_merging_twice_unmerging_twice_and_switching_while_merged():
    m = tiny.adapted("bert")
    with pytest.raises(ValueError, match="nothing to unmerge"):
        lora.unmerge(m)
    lora.merge(m)
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(m)
    with pytest.raises(ValueError, match="cannot be switched"):
        lora.adapters(m)["layers.0.q_proj"].enabled = False
    lora.unmerge(m)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        lora.unmerge(m)


def test_merge_with_dropout_needs_eval():
    m = tiny.model("bert")
    lora.inject(m, r=2, lora_dropout=0.5)
    with pytest.raises(ValueError, match="in train mode"):
        lora.merge(m)
    assert not any(a.merged for a in lora.adapters(m).values())
    m.eval()
    lora.merge(m)


def test_branch_dropout_acts_on_the_input_and_in_train_mode_only():
    """E[h] over masks is W x + s B A x: inverted dropout, on the branch alone."""
    layer, x = generic_layer(dropout=0.25)
    layer.eval()
    clean = layer(x)
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, clean, rtol=0, atol=0.05)
    zeros = torch.zeros_like(x)
    assert torch.equal(layer(zeros), layer.base(zeros))


# ------------------------------------------------------------------------------------ adapter files


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "llama"))
def test_a_saved_adapter_in_a_fresh_model_gives_the_same_logits(family, tmp_path):
    """Two lines: with shortcuts, switches, ranks that differ, and the head."""
    m = tiny.adapted(family, shortcuts=lora.SHORTCUTS["all"])
    layers = lora.adapters(m)
    lora.switch(m, set(list(layers)[::2]))
    keep_ranks(layers["layers.1.k_proj"], [0, 2])
    lora.save_adapter(m, tmp_path)
    fresh = tiny.model(family)
    for name in fresh.head:
        tiny.randomise(fresh.get_submodule(name).parameters(), seed=9)
    before = torch.get_rng_state()
    lora.load_adapter(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    batch = tiny.batch(m.config)
    assert torch.equal(fresh(**batch).logits, m(**batch).logits)
    for name, layer in lora.adapters(fresh).items():
        known = layers[name]
        assert layer.enabled == known.enabled and layer.r == known.r
        assert (layer.in_features, layer.out_features) == (known.in_features, known.out_features)
        assert layer.lora_alpha == pytest.approx(known.lora_alpha)
    assert not any(p.requires_grad for p in fresh.parameters())


def test_delta_loras_pairs_come_back_at_rank_2r(tmp_path):
    from delta_lora import DeltaLoRA

    m = tiny.adapted("bert", r=8)
    never_on = "layers.1.v_proj"
    lora.adapters(m)[never_on].enabled = False
    delta = DeltaLoRA(m, 1.5, start=0)
    for i in range(4):
        delta.before_step()
        tiny.randomise([p for n, p in lora.trainable(m).items() if "lora_" in n], seed=20 + i)
        delta.after_step()
    lora.save_adapter(m, tmp_path / "a.safetensors", delta.export())
    fresh = tiny.model("bert")
    layers = lora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert list(layers) == [name for name in lora.adapters(m) if name != never_on]
    _, about = adapter_file.read(tmp_path / "a.safetensors", "none")
    assert [name for name, said in about.items() if not said["enabled"]] == [never_on]
    assert {layer.r for layer in layers.values()} == {16}  # more than the 12 features
    batch = tiny.batch(m.config)
    torch.testing.assert_close(fresh(**batch).logits, m(**batch).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_has_moved_stays_in_the_file_though_it_is_off_at_the_end(lazy, tmp_path):
    """Three modules at r 1: on to the end and moved, moved and then off, not on yet."""
    from delta_lora import DeltaLoRA

    m = tiny.adapted("bert", r=1)
    names = list(lora.adapters(m))
    lora.switch(m, set(names[:2]))
    delta = DeltaLoRA(m, 1.5, start=0, lazy=lazy)
    for i in range(4):
        delta.before_step()
        tiny.randomise([p for n, p in lora.trainable(m).items() if "lora_" in n], seed=20 + i)
        delta.after_step()
    lora.switch(m, {names[0], names[2]})
    lora.save_adapter(m, tmp_path, delta.export())
    fresh = tiny.model("bert")
    loaded = lora.load_adapter(fresh, tmp_path)
    assert [(n, a.enabled) for n, a in loaded.items()] == [(n, True) for n in names[:3]]
    assert loaded[names[2]].r == 1
    batch = tiny.batch(m.config)
    torch.testing.assert_close(fresh(**batch).logits, m(**batch).logits, rtol=0, atol=1e-10)


def test_equal_adapters_are_equal_files(tmp_path):
    """Also where there is more to say than of the modules."""
    m = tiny.adapted("bert", shortcuts=("shortcut_sa",), shortcut_norm="reuse")
    path, found = tmp_path / "adapter.safetensors", set()
    for _ in range(12):
        lora.save_adapter(m, tmp_path)
        found.add(path.read_bytes())
    assert len(found) == 1
    fresh = tiny.model("bert", shortcut_norm="reuse")
    lora.load_adapter(fresh, tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["adapters"])["shortcut_norm"] == "reuse"
    with pytest.raises(ValueError, match="trained with shortcut_norm 'reuse'"):
        lora.load_adapter(tiny.model("bert"), tmp_path)


@pytest.mark.parametrize("kind", [AdaLoRALayer, METHODS["adapter"]["lora_xs"]])
def test_what_a_relative_draws_does_not_depend_on_torchs_default_dtype(kind):
    def drawn():
        m = tiny.model("bert")
        lora.inject(m, ("q_proj",), r=2, adapter=kind)
        return {n: p for a in lora.adapters(m).values() for n, p in a.named_parameters()}

    expected = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_module_that_lost_all_its_ranks_is_left_out_when_loaded(tmp_path):
    """AdaLoRA's, whose E is 0: enabled as a switch has it, and of rank 0 in the file."""
    m = tiny.model("bert")
    lora.inject(m, ("q_proj",), r=2, lora_alpha=5, adapter=AdaLoRALayer)
    tiny.randomise([p for n, p in lora.trainable(m).items() if "lora_" in n], 3)
    first, *others = lora.adapters(m)
    lora.adapters(m)[first].lora_E.data.zero_()
    lora.save_adapter(m, tmp_path)
    fresh, batch = tiny.model("bert"), tiny.batch(m.config)
    loaded = lora.load_adapter(fresh, tmp_path)
    assert list(loaded) == others and all(layer.enabled for layer in loaded.values())
    expected, got = (x.eval()(**batch).logits for x in (m, fresh))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_adapter_files_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    m = tiny.adapted("bert", targets=("q_proj", "fc1"))
    lora.save_adapter(m, tmp_path / "good.safetensors")
    norm = tiny.adapted("bert", shortcuts=("shortcut_sa",), shortcut_norm="reuse")
    lora.save_adapter(norm, tmp_path / "norm.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with safetensors.safe_open(tmp_path / "good.safetensors", "pt") as file:
        about = file.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "good.safetensors")
    elsewhere = (
        "layers.0.attn_norm",
        "layers.0.shortcut_ffn",
        "word_embeddings",
        "layers.0.forward",
    )
    for name in elsewhere:  # what the model has, and no module can take the place of
        moved = {key.replace("layers.0.fc1", name): value for key, value in tensors.items()}
        said = {key: value.replace("layers.0.fc1", name) for key, value in about.items()}
        safetensors.torch.save_file(moved, tmp_path / f"{name}.safetensors", said)
    for name, model, message in (
        ("good", tiny.model("bert", hidden_size=6, num_heads=2), r"lora_A is \(3, 12\), not \(3"),
        ("good", tiny.model("bert", num_layers=2), "adapts layers.2.q_proj, which this model"),
        ("good", tiny.model("bert", num_labels=4), "classifier"),
        ("norm", tiny.model("bert"), "trained with shortcut_norm 'reuse'"),
        *(
            (name, tiny.model("bert"), f"adapts {name}, which this model lacks")
            for name in elsewhere
        ),
        ("text", tiny.model("bert"), "is no adapter of this program"),
        ("good", m, "has LoRA modules already"),
    ):
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=message) as error:
            lora.load_adapter(model, tmp_path / f"{name}.safetensors")
        assert list(model.state_dict()) == before and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        lora.load_adapter(tiny.model("bert"), tmp_path / "none")


def test_state_dict_carries_the_switches_and_refuses_merged_into_unmerged():
    m, batch = tiny.adapted("bert"), tiny.batch(tiny.config("bert"))
    lora.switch(m, set(list(lora.adapters(m))[::3]))
    other = tiny.adapted("bert", seed=5)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(**batch).logits, m(**batch).logits)
    lora.merge(m)
    with pytest.raises(ValueError, match="call unmerge"):
        other.load_state_dict(m.state_dict())
    assert all(
        "lora_" in key
        for key in set(m.state_dict()) - set(tiny.model("bert").state_dict())
        if ".base." not in key
    )
