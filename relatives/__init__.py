"""The relatives: other low-rank methods that the two papers are read beside, one a file.

Three kinds, three small interfaces. To add one is a file and its line in METHODS.

    kind       | what METHODS names
    adapter    | a LoRALayer of another form, which lora.inject puts on the targets
    optimizer  | a function (model, lr, weight_decay) -> torch.optim.Optimizer
    allocator  | a class with before_step() and after_step() around the optimizer's step, state() and
               | load() for the checkpoint, and the adapter that it allocates the ranks of

An adapter has the arguments of LoRALayer and overrides what differs: forward, delta_w (what it adds
to the weight), factors (the tensors that train), pair (what it exports as). Where modules share
something, its static method connect(layers, seed) is called once, when all are in their places.

single_ranks.py is HeteroLoRA's own: --per-rank yes.

What this package does not do: import transformers or PEFT, or need a line of its own in train.py.
"""

from lora import LoRALayer
from relatives.adalora import AdaLoRA
from relatives.alora import ALoRA
from relatives.lora_plus import lora_plus
from relatives.lora_pro import lora_pro
from relatives.lora_rite import lora_rite
from relatives.plain import adamw
from relatives.riemannian import riemannian

METHODS = {  # kind -> name -> method
    "adapter": {"lora": LoRALayer},
    "optimizer": {
        "adamw": adamw,
        "loraplus": lora_plus,
        "riemannian": riemannian,
        "lora_pro": lora_pro,
        "lora_rite": lora_rite,
    },
    "allocator": {"adalora": AdaLoRA, "alora": ALoRA},
}

OF_B_A = "its steps are made for B A, and the module is B diag(E) A"
OF_RANKS = "each rank has moments of its own, which AdamW alone keeps"
INCOMPATIBLE = {  # method -> flag (other than its default), or flag and value -> why not
    "lora_rite": {"--per-rank yes": "its moments are made for r ranks, and ranks would go"},
    "adalora": {
        "--adapter": "it brings an adapter of its own, B diag(E) A",
        "--optimizer riemannian": OF_B_A,
        "--optimizer lora_pro": OF_B_A,
        "--optimizer lora_rite": OF_B_A,
        "--delta-ratio": "Delta-LoRA is made for B A: W would move by what the masks take out",
    },
    "alora": {
        "--adapter": "it brings an adapter of its own, with places for ranks that grow",
        "--optimizer": OF_RANKS,
        "--delta-ratio": "W would move by what is pruned and drawn anew, which nothing has learned",
    },
}
KINDS = {"adapter": "adapter", "optimizer": "optimizer", "allocate": "allocator"}  # flag -> kind
NEUTRAL = (None, 0, "no", "none", "lora", "adamw")


def refuse_incompatible(args):
    """Raises ValueError where a method and another flag do not go together, with the reason.

    Args:
        args: dict flag (with _ for -) -> value.
    """
    for kind in KINDS:
        method = args[kind]
        if method in METHODS[KINDS[kind]] and method not in NEUTRAL and not args["targets"]:
            raise ValueError(f"--{kind} {method} needs --targets: it is about linear layers")
        for feature, reason in INCOMPATIBLE.get(method, {}).items():
            flag, _, value = feature.partition(" ")
            got = args[flag[2:].replace("-", "_")]
            if got == value if value else got not in NEUTRAL:
                what = feature if value else f"{flag} {got}"
                raise ValueError(f"--{kind} {method} does not go with {what}: {reason}")
