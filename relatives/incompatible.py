"""What does not go together, and why: the methods of this package, and the flags of a run.

A reason is said as it stands in the message of the run that is refused, so each is one line.

What this file does not do: check what needs a model's sizes (lora.inject, connect of a class).
"""

from relatives import METHODS

KINDS = {"adapter": "adapter", "optimizer": "optimizer", "allocate": "allocator"}  # flag -> kind
NEUTRAL = (None, 0, "no", "none", "lora", "adamw")  # values of flags that ask for nothing


def no_rule(reason):
    """Of an adapter: the optimizer rules that are made for a pair do not go with it."""
    return {f"--optimizer {rule}": reason for rule in ("riemannian", "lora_pro", "lora_rite")}


SHARED = {
    "--per-rank yes": "its modules share A and B: a rank cannot be on in one and off in another",
    "--budget-params": "its modules share A and B: a single one has no price; use --keep",
    "--when-off frozen": "what is off would move: A and B, which it shares, train on in the others",
    "--proxy fisher": "A is shared, so that a channel has one score for all blocks",
    "--proxy size": "its modules share A and B: a single one has no size",
}
IN_NEIGHBOURS = "what is off would move: the pairs of earlier blocks, which it adds, train on"
PLAIN = "Delta-LoRA is made for a pair of which one module trains both factors"
HALF = "one factor is frozen: no rank has both a row of A and a column of B to train"
NO_CHANNEL = "it scores the rows of a trained A, and none trains here"
NO_PAIR = no_rule("the rule is made for a pair A, B of which one module trains both factors")
FROZEN_B = "B is frozen, and it is B's rate that the rule is about"
RATE_OF_B = {"--optimizer loraplus": FROZEN_B}
INCOMPATIBLE = {  # method -> flag (other than its default), or flag and value -> why not
    "dora": {
        "--delta-ratio": "the norms of W + s B A would follow W: the pair no longer exports",
        "--per-rank yes": "the magnitude belongs to all ranks of a module: none has a price alone",
    },
    "asymmetry": {
        **NO_PAIR,
        "--delta-ratio": PLAIN,
        "--per-rank yes": HALF,
        "--proxy fisher": NO_CHANNEL,
    },
    "lora_xs": {
        **NO_PAIR,
        **RATE_OF_B,
        "--delta-ratio": "A and B are made from W, which has to stand still",
        "--per-rank yes": "R mixes the ranks: none can be off alone",
        "--proxy fisher": NO_CHANNEL,
    },
    "sbora_fa": {
        **NO_PAIR,
        "--delta-ratio": PLAIN,
        "--per-rank yes": HALF,
        "--proxy fisher": NO_CHANNEL,
    },
    "sbora_fb": {**NO_PAIR, **RATE_OF_B, "--delta-ratio": PLAIN, "--per-rank yes": HALF},
    "prolora": {
        **no_rule("the rule is made for whole factors, and a chunk stands for several rows"),
        "--delta-ratio": PLAIN,
        "--per-rank yes": "a row of the chunk stands in several ranks: none can be off alone",
        "--proxy fisher": "a row of the chunk stands in several ranks: it is no channel's alone",
    },
    "tied": {**SHARED, **NO_PAIR, "--delta-ratio": PLAIN},
    "condlora": {
        **SHARED,
        **NO_PAIR,
        "--optimizer loraplus": "B is made from W, and it is B's rate that the rule is about",
        "--delta-ratio": "A and B are made from W, which has to stand still",
        "--shard yes": "A and B are made from W, which no process has whole",
    },
    "cora": {
        **NO_PAIR,
        "--optimizer loraplus": FROZEN_B,
        "--delta-ratio": PLAIN,
        "--per-rank yes": "B is frozen, and the same for q, k and v: no rank has a column to train",
    },
    "reslora_input": {"--delta-ratio": "the change of B A is no gradient of W on x alone"},
    "reslora_block": {
        "--delta-ratio": "a pair stands in several modules, and would move several weights",
        "--when-off frozen": IN_NEIGHBOURS,
    },
    "reslora_middle": {
        **no_rule("the rule is made for a product B A, and here A meets the B of other blocks"),
        "--delta-ratio": "the change of B A is no gradient of W on x alone",
        "--per-rank yes": "rank k of a block's A goes through rank k of its neighbours' B",
        "--when-off frozen": IN_NEIGHBOURS,
    },
    "lora_rite": {
        "--per-rank yes": "its moments have r ranks from the start: no resuming with less"
    },
    "adalora": {
        **no_rule("the rule is made for a product B A, and the module is B diag(E) A"),
        "--adapter": "it brings an adapter of its own, B diag(E) A",
        "--delta-ratio": "Delta-LoRA is made for B A: W would move by what the masks take out",
    },
    "alora": {
        "--adapter": "it brings an adapter of its own, with places for ranks that grow",
        "--optimizer": "each rank has moments of its own, which AdamW alone keeps",
        "--delta-ratio": "W would move by what is pruned and drawn anew, which nothing has learned",
    },
}


def refuse_incompatible(args):
    """Raises ValueError where a method and another flag do not go together, with the reason.

    Args:
        args: dict flag (with _ for -) -> value.
    """
    for flag, kind in KINDS.items():
        method = args[flag]
        if method in NEUTRAL or method not in METHODS[kind]:
            continue
        if not args["targets"] and (kind != "optimizer" or args["shortcuts"] == "none"):
            raise ValueError(f"--{flag} {method} needs --targets: it is about linear layers")
        for feature, reason in INCOMPATIBLE.get(method, {}).items():
            other, _, value = feature.partition(" ")
            got = args[other[2:].replace("-", "_")]
            if got == value if value else got not in NEUTRAL:
                what = f"{other} {got}"
                raise ValueError(f"--{flag} {method} does not go with {what}: {reason}")
