"""Delta-LoRA against PEFT, which lacks it: from step 0 on it is LoRA with (1 + lambda) alpha."""

import peft
import pytest
import torch

import lora
import tiny
from delta_lora import DeltaLoRA
from support import hf_folder

RATIO = 1.5
TARGETS = {"bert": ["query", "value"], "opt": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("family", TARGETS)
def test_a_run_from_step_0_loss_by_loss(pair, family):
    """AdamW, same rate and decay, eps times 1 + lambda; then both merged models agree."""
    peer, ours = pair(family)
    adapters = lora.inject(ours, ("q_proj", "v_proj"), r=3, lora_alpha=5)
    lora.mark_trainable(ours)
    config = peft.LoraConfig(
        r=3, lora_alpha=5 * (1 + RATIO), target_modules=TARGETS[family], task_type="SEQ_CLS"
    )
    peer = peft.get_peft_model(peer, config).double()
    modules = dict(peer.named_modules())
    for name, layer in adapters.items():
        path = hf_folder.hf_module(family, name)
        (theirs,) = [m for n, m in modules.items() if n.endswith(path) and hasattr(m, "lora_A")]
        theirs.lora_A.default.weight.data.copy_(layer.lora_A)
    optimizers = []
    for m, eps in ((ours, 1e-8), (peer, 1e-8 * (1 + RATIO))):
        pairs = [p for n, p in m.named_parameters() if "lora_" in n and p.requires_grad]
        head = [p for n, p in m.named_parameters() if "lora_" not in n and p.requires_grad]
        groups = [{"params": pairs, "eps": eps}, {"params": head}]
        optimizers.append(torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1))
    delta, losses = DeltaLoRA(ours, RATIO, start=-1), ([], [])
    for step in range(40):
        batch = tiny.batch(ours.config, seed=step)
        for m, optimizer, record in zip((ours, peer), optimizers, losses, strict=True):
            loss = m(**batch).loss
            loss.backward()
            if m is ours:
                delta.before_step()
            optimizer.step()
            if m is ours:
                delta.after_step()
            optimizer.zero_grad()
            record.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    lora.merge(ours)
    batch = tiny.batch(ours.config, seed=99)
    expected = peer.merge_and_unload()(**batch).logits
    torch.testing.assert_close(ours(**batch).logits, expected, rtol=0, atol=1e-9)


def test_identities_on_minilm_after_fifty_real_steps():
    """float64, MiniLM, the embedded task: telescoping, rank, export, after 50 steps of AdamW."""
    from model import load_pretrained
    from support import glue, seeds

    model, tokenizer = load_pretrained("minilm")
    adapters = lora.inject(model, ("q_proj", "v_proj"), r=8, lora_alpha=16)
    lora.mark_trainable(model)
    model.double()
    w0 = {n: a.base.weight.detach().clone() for n, a in adapters.items()}
    delta = DeltaLoRA(model, ratio=2.0, start=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train, _ = glue.encode(glue.load_task("paraphrase")[0], tokenizer, 128)
    batches = glue.grouped_by_length(train, 8, seeds.generator(0, "order/0"))
    for step in range(50):
        model(**glue.collate([train[i] for i in batches[step]], 0, True)).loss.backward()
        delta.before_step()
        optimizer.step()
        delta.after_step()
        optimizer.zero_grad()
        if step == 10:  # P(K + 1), after step 11
            begin = {n: (a.lora_B @ a.lora_A).detach() for n, a in adapters.items()}
    exported = delta.export()
    for name, layer in adapters.items():
        w, p = layer.base.weight.detach(), (layer.lora_B @ layer.lora_A).detach()
        torch.testing.assert_close(w - w0[name], 2.0 * 2 * (p - begin[name]), rtol=0, atol=1e-14)
        lora_A, lora_B = exported[name]
        assert lora_A.shape == (16, 384)
        effective = w + layer.delta_w().detach()
        torch.testing.assert_close(w0[name] + lora_B @ lora_A, effective, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(effective - w0[name], rtol=1e-9) <= 16
        assert (w - w0[name]).abs().max() > 1e-4
