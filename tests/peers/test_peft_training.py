"""lora.py against PEFT: the same A and B, then the same training."""

import peft
import pytest
import torch

import lora
import tiny
from support import hf_folder

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "opt": ["q_proj", "v_proj", "fc1"],
}


def peft_pair(pair, family):
    """PEFT's model and ours, adapted alike, A and B copied over."""
    peer, ours = pair(family)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[family], task_type="SEQ_CLS")
    peer = peft.get_peft_model(peer, config).double()
    adapters = lora.inject(ours, ("q_proj", "v_proj", "fc1"), r=3, lora_alpha=5)
    tiny.randomise([a.lora_B for a in adapters.values()], 1)
    lora.mark_trainable(ours)
    modules = dict(peer.named_modules())
    matched = {}
    for name, layer in adapters.items():
        path = hf_folder.hf_module(family, name)
        (theirs,) = [m for n, m in modules.items() if n.endswith(path) and hasattr(m, "lora_A")]
        theirs.lora_A.default.weight.data.copy_(layer.lora_A)
        theirs.lora_B.default.weight.data.copy_(layer.lora_B)
        matched[name] = theirs
    assert len(matched) == sum(hasattr(m, "lora_A") for m in modules.values())
    return peer, ours, adapters, matched


@pytest.mark.parametrize("family", TARGETS)
def test_logits_and_gradients(pair, family):
    peer, ours, adapters, matched = peft_pair(pair, family)
    batch = tiny.batch(ours.config)
    expected, got = peer(**batch), ours(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-10)
    expected.loss.backward()
    got.loss.backward()
    for name, layer in adapters.items():
        theirs = matched[name]
        for ours_, peers in ((layer.lora_A, theirs.lora_A), (layer.lora_B, theirs.lora_B)):
            torch.testing.assert_close(ours_.grad, peers.default.weight.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", TARGETS)
def test_thirty_steps_of_adamw(pair, family):
    """Every loss of a training run, head included."""
    peer, ours, _, _ = peft_pair(pair, family)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        for m in (peer, ours)
    ]
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (peer, ours)]
    if (
        family == "opt"
    ):  # BERT: PEFT trains what it wraps, both train the pooler only if it is fresh
        assert counts[0] == counts[1]
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
