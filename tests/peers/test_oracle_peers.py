"""Two other implementations before the oracle: PEFT's LoRA, and zero-cost-nas' proxies on PEFT."""

from pathlib import Path

import peft_candidate
from tools.oracle import __main__ as oracle


def test_peft_passes():
    lines, failures, passes = oracle.check(Path(__file__).parents[1] / "golden", peft_candidate)
    assert failures == 0, "\n".join(lines)
    passed = {line.split()[0] for line in lines if line.endswith("pass")}
    assert passes == 2 * len(passed) and len(passed) == 9 + 2 + 8  # layers, logits, scores
    proxies = ("grad_norm", "snip", "grasp", "constant")
    assert {f"scores-{p}-{point}-lora" for p in proxies for point in ("b0", "b")} <= passed
