"""Relatives against PEFT: DoRA natively, Asymmetry by freezing lora_A; and what leaves for PEFT.

PEFT's DoRA agrees by design in all of it: norms over the inputs of an output, without a gradient,
and dropout on the input of all that is added.
"""

import peft
import pytest
import torch

import lora
import tiny
from model import load_pretrained
from peer_models import build_pair
from relatives import METHODS
from relatives.dora import DoRA
from support import hf_folder
from test_peft_files import finished_run, logits, stock
from tools.peft import commands, reading, writing

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "opt": ["q_proj", "v_proj", "fc1"],
}
KINDS = ("dora", "asymmetry", "lora_xs", "sbora_fa", "sbora_fb", "prolora")


def peft_pair(pair, family, kind, dropout=0.0):
    """PEFT's model and ours, adapted alike, factors copied over; {name: (ours, theirs)}."""
    peer, ours = pair(family)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS[family],
        task_type="SEQ_CLS",
        use_dora=kind == "dora",
        lora_dropout=dropout,
    )
    peer = peft.get_peft_model(peer, config).double()
    adapter, places = METHODS["adapter"][kind], ("q_proj", "v_proj", "fc1")
    layers = lora.inject(ours, places, r=3, lora_alpha=5, lora_dropout=dropout, adapter=adapter)
    tiny.randomise([f for a in layers.values() for f in a.factors().values()], 1)
    lora.mark_trainable(ours)
    modules, matched = dict(peer.named_modules()), {}
    for name, layer in layers.items():
        path = hf_folder.hf_module(family, name)
        (theirs,) = [m for n, m in modules.items() if n.endswith(path) and hasattr(m, "lora_A")]
        theirs.lora_A.default.weight.data.copy_(layer.lora_A)
        theirs.lora_B.default.weight.data.copy_(layer.lora_B)
        if kind == "dora":
            theirs.lora_magnitude_vector.default.weight.data.copy_(layer.lora_magnitude)
        else:
            theirs.lora_A.default.weight.requires_grad_(False)
        matched[name] = layer, theirs
    assert len(matched) == sum(bool(getattr(m, "lora_A", None)) for m in modules.values())
    return peer, ours, matched


def factors_of(theirs, kind):
    found = {"lora_B": theirs.lora_B.default.weight}
    if kind == "dora":
        magnitude = theirs.lora_magnitude_vector.default.weight
        found |= {"lora_A": theirs.lora_A.default.weight, "lora_magnitude": magnitude}
    return found


@pytest.mark.parametrize("kind", ["dora", "asymmetry"])
@pytest.mark.parametrize("family", TARGETS)
def test_logits_and_gradients(pair, family, kind):
    peer, ours, matched = peft_pair(pair, family, kind)
    batch = tiny.batch(ours.config)
    expected, got = peer(**batch), ours(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-10)
    expected.loss.backward()
    got.loss.backward()
    for layer, theirs in matched.values():
        peers = factors_of(theirs, kind)
        assert set(peers) == set(layer.factors())
        for key, factor in layer.factors().items():
            torch.testing.assert_close(factor.grad, peers[key].grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["dora", "asymmetry"])
@pytest.mark.parametrize("family", TARGETS)
def test_thirty_steps_of_adamw(pair, family, kind):
    """Every loss of a training run, head included, with weight decay on all that trains."""
    peer, ours, _ = peft_pair(pair, family, kind)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        for m in (peer, ours)
    ]
    losses = ([], [])
    for step in range(30):
        batch = tiny.batch(ours.config, seed=step)
        for m, optimizer, record in zip((peer, ours), optimizers, losses, strict=True):
            loss = m(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    assert abs(losses[0][0] - losses[0][-1]) > 0.01


def test_dropout_of_dora_falls_on_the_same_numbers(pair):
    """The same mask, the same output: in the paper nothing, in PEFT the base term sees it too."""
    _, _, matched = peft_pair(pair, "bert", "dora", dropout=0.4)
    layer, theirs = matched["layers.1.fc1"]
    x, outputs = torch.randn(3, 7, 12, dtype=torch.float64), []
    for module in (layer.train(), theirs.train()):
        torch.manual_seed(3)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)
    assert (outputs[0] - layer.eval()(x)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_run_loads_into_peft(tmp_path, family, kind):
    """What is of low rank as plain LoRA, DoRA with its magnitude; GPT-2 has q, k and v in one."""
    places = "q_proj,k_proj,v_proj,fc1"
    flags = f"--preset lora --lora-alpha 5 --adapter {kind} --targets {places}"
    base, out, run = finished_run(tmp_path, family, flags)
    expected = logits(run.model, run)
    assert (expected - logits(stock(base), run)).abs().max() > 1e-3
    for pad in (False, True):
        folder = tmp_path / f"adapter-{pad}"
        config = writing.export(out, folder, pad=pad)
        assert config.get("use_dora", False) == (kind == "dora")
        lines, agree = commands.inspect(folder)
        assert agree, lines
        peer = peft.PeftModel.from_pretrained(stock(base), folder)
        torch.testing.assert_close(logits(peer, run), expected, rtol=0, atol=1e-6)
        fresh, _ = load_pretrained(str(base), num_labels=2)
        reading.put(fresh, *reading.read(folder, fresh))
        torch.testing.assert_close(logits(fresh, run), expected, rtol=0, atol=1e-6)


PEFT_TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "roberta": ["key", "attention.output.dense"],
    "opt-350m": ["k_proj", "fc1"],
    "gpt2": ["c_attn", "c_fc"],
}


@pytest.mark.parametrize("family", PEFT_TARGETS)
def test_a_dora_adapter_of_peft_loads_into_ours(tmp_path, family):
    """Through reading.put, and through our own adapter file."""
    peer, ours = build_pair(tmp_path, family, num_labels=2)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=PEFT_TARGETS[family],
        task_type="SEQ_CLS",
        use_dora=True,
        rank_pattern={PEFT_TARGETS[family][0]: 2},
    )
    peer = peft.get_peft_model(peer, config).double().eval()
    tiny.randomise([p for p in peer.parameters() if p.requires_grad], 2)
    peer.save_pretrained(tmp_path / "adapter")
    layers = reading.put(ours, *reading.read(tmp_path / "adapter", ours))
    assert all(type(layer) is DoRA for layer in layers.values())
    batch = tiny.batch(ours.config)
    with torch.no_grad():  # the file is in float32 where the peer's model was not
        expected = peer(**batch).logits
        torch.testing.assert_close(ours.eval()(**batch).logits, expected, rtol=0, atol=1e-5)
        commands.import_folder(tmp_path / "adapter", tmp_path / "out", str(tmp_path))
        fresh, _ = load_pretrained(str(tmp_path), num_labels=2)
        lora.load_adapter(fresh, tmp_path / "out", DoRA)
        torch.testing.assert_close(fresh(**batch).logits.double(), expected, rtol=0, atol=1e-5)
