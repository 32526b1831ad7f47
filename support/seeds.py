"""Random numbers that depend on a seed and a name, and on nothing else.

Each consumer of randomness (the data order of an epoch, the fresh head, the lora_A of one module,
the ties of an allocation) asks for a generator by name. Adding a consumer, or drawing more from
one, never moves another; torch's global generator is neither read nor rewound.

What this file does not do: seed anything global (train.py seeds torch once, for dropout alone).
"""

import hashlib

import torch


def generator(seed, name):
    """A CPU generator for one named consumer.

    Args:
        seed: int, the seed of the run.
        name: str, for example "lora_A/layers.0.q_proj" or "order/3".

    Returns:
        torch.Generator, seeded with the first 8 bytes of SHA-256("seed/name"). (A hash, since seeds
        that differ by one would give Mersenne-Twister streams that are related.)
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
