"""Two other implementations before the oracle: PEFT's layers, zero-cost-nas' proxies on PEFT."""

import peft_candidate
from tools.oracle import check
from tools.oracle.__main__ import GOLDEN


def test_peft_passes():
    rows = check.check(GOLDEN, peft_candidate)
    assert not {r.content["name"]: r.reason for r in rows if r.verdict == "FAIL"}
    passed = [row.content["name"] for row in rows if row.verdict == "pass"]
    assert len(passed) == 2 * len(set(passed))  # in both precisions
    assert len(set(passed)) == 12 + 2 + 2 + 8  # layers, DoRA, logits, scores
    proxies = ("grad_norm", "snip", "grasp", "constant")
    assert {f"scores-{p}-{point}-lora" for p in proxies for point in ("b0", "b")} <= set(passed)
