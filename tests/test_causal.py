"""LLaMA and its relatives: model.py against dense.py, and what their files say and refuse."""

import pytest
import torch

import dense
import lora
import proxies
import tiny
from model import Config

ALL = lora.SHORTCUTS["all"]


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_logits_equal_the_dense_derivation(family, head):
    """Every place adapted, the four shortcuts too; lengths beyond where the rope is scaled."""
    m = tiny.adapted(family, shortcuts=ALL, head=head)
    batch = tiny.batch(m.config, lengths=(37, 4, 6))
    got, expected = m(**batch).logits, dense.logits(m, batch)
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        ours = got[i, :n] if head == "lm" else got[i]
        torch.testing.assert_close(ours, expected[i], rtol=0, atol=1e-10)
