"""LoRA-adapted shortcut connections, all four, on all families, against explicit dense matrices."""

import pytest
import torch

import dense
import lora
import tiny

CASES = [(f, kind) for f in (*tiny.FAMILIES, "llama") for kind in ("residual", "cross", "all")]


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("norm", ["none", "reuse"])
def test_forward_equals_dense_matrices(family, kind, norm):
    """W + s BA, I + s BA and s BA; with and without the released second LayerNorm."""
    m = tiny.adapted(family, shortcuts=lora.SHORTCUTS[kind], shortcut_norm=norm)
    batch = tiny.batch(m.config)
    got = m(**batch).logits
    torch.testing.assert_close(got, dense.logits(m, batch), rtol=0, atol=1e-11)
    for name, layer in lora.adapters(m).items():
        if name.rpartition(".")[2] in lora.SHORTCUTS[kind]:
            layer.enabled = False
    without = m(**batch).logits
    torch.testing.assert_close(without, dense.logits(m, batch), rtol=0, atol=1e-11)
    assert (got - without).abs().max() > 1e-4


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "llama"))
def test_at_initialisation_the_model_is_the_same_to_the_bit(family):
    m = tiny.model(family, dtype=torch.float32)
    batch = tiny.batch(m.config)
    before = m(**batch).logits
    lora.inject(m, lora.LINEARS, shortcuts=lora.SHORTCUTS["all"])
    assert torch.equal(m(**batch).logits, before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_released_second_layer_norm_changes_the_model_at_step_0(family):
    """LN(LN(x)) is not LN(x) unless the gain is 1 and the bias 0; also with every shortcut off."""
    m = tiny.model(family, shortcut_norm="reuse")
    batch = tiny.batch(m.config)
    before = m(**batch).logits
    layers = lora.inject(m, (), shortcuts=lora.CROSS)
    assert (m(**batch).logits - before).abs().max() > 1e-3
    for layer in layers.values():
        layer.enabled = False
    assert (m(**batch).logits - before).abs().max() > 1e-3


def test_number_of_shortcuts():
    """4 per layer, less shortcut_ffn of layer 0: 95 in 24 layers, as in the authors' runs."""
    m = tiny.model("opt", num_layers=24)
    layers = lora.inject(m, (), r=2, shortcuts=lora.SHORTCUTS["all"], shortcut_alpha=4)
    assert len(layers) == 95
    assert "layers.0.shortcut_ffn" not in layers
    assert all(a.scaling == 2 and a.in_features == a.out_features == 12 for a in layers.values())
