"""What the files of known mistakes share.

    call      functools.partial by a shorter name: the mistake is made only if somebody asks
    scales    wrong scalings of a low-rank branch

What this file does not do: know a function of the interface (causes.py and its parts).
"""

import functools
import math

call = functools.partial


def scales(lora_alpha, r):
    """{cause: wrong scaling}."""
    return {
        "scale lora_alpha instead of lora_alpha / r": lora_alpha,
        "scale lora_alpha / sqrt(r), as rsLoRA": lora_alpha / math.sqrt(r),
        "scale lora_alpha // r, rounded down": lora_alpha // r,
        "scale r / lora_alpha": r / lora_alpha,
        "no scale": 1.0,
        "scale applied twice": (lora_alpha / r) ** 2,
        "the low-rank branch is missing": 0.0,
    }
