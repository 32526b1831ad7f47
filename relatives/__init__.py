"""The relatives: other low-rank methods that the two papers are read beside, one a file.

Three kinds, three small interfaces. To add one is a file and its line in METHODS.

    kind       | what METHODS names
    adapter    | a LoRALayer of another form, which lora.inject puts on the targets
    optimizer  | a function (model, lr, weight_decay) -> torch.optim.Optimizer
    allocator  | a class with before_step() and after_step() around the optimizer's step

An adapter has the arguments of LoRALayer and overrides what differs: forward, delta_w (what it adds
to the weight), factors (the tensors that train), pair (what it exports as). Where modules share
something, its static method connect(layers, seed) is called once, before they are put in their
places. Of a shared factor each of its modules has the parameter itself in factors(): it is stored,
stepped and counted once. A branch that is no matrix on x says why in `unmergeable`, and one that
takes from other blocks' inputs has `every_token`.

single_ranks.py is HeteroLoRA's own: --per-rank yes.

What this package does not do: import transformers or PEFT, or need a line of its own in train.py.
"""

from lora import LoRALayer
from relatives.asymmetry import Asymmetry
from relatives.condlora import CondLoRA
from relatives.cora import CoRA, CoRATrained
from relatives.dora import DoRA
from relatives.lora_xs import LoRAXS
from relatives.plain import adamw
from relatives.prolora import PRoLoRA
from relatives.reslora import ResLoRABlock, ResLoRAInput, ResLoRAMiddle
from relatives.sbora import SBoRAFA, SBoRAFB
from relatives.tied import TiedLoRA

METHODS = {  # kind -> name -> method
    "adapter": {
        "lora": LoRALayer,
        "dora": DoRA,
        "asymmetry": Asymmetry,
        "lora_xs": LoRAXS,
        "sbora_fa": SBoRAFA,
        "sbora_fb": SBoRAFB,
        "prolora": PRoLoRA,
        "tied": TiedLoRA,
        "condlora": CondLoRA,
        "cora": CoRA,
        "cora_trained": CoRATrained,
        "reslora_input": ResLoRAInput,
        "reslora_block": ResLoRABlock,
        "reslora_middle": ResLoRAMiddle,
    },
    "optimizer": {"adamw": adamw},
    "allocator": {},
}

SHARED = {
    "--per-rank yes": "its modules share A and B: a rank cannot be on in one and off in another",
    "--budget-params": "its modules share A and B: a single one has no price; use --keep",
    "--when-off frozen": "what is off would move: A and B, which it shares, train on in the others",
    "--proxy fisher": "A is shared, so that a channel has one score for all blocks",
}
IN_NEIGHBOURS = "what is off would move: the pairs of earlier blocks, which it adds, train on"
PLAIN = "Delta-LoRA is made for a pair of which one module trains both factors"
HALF = "one factor is frozen: no rank has both a row of A and a column of B to train"
NO_CHANNEL = "it scores the rows of a trained A, and none trains here"
INCOMPATIBLE = {  # adapter -> flag, or flag and value -> why they do not go together
    "dora": {
        "--delta-ratio": "the norms of W + s B A would follow W: the pair no longer exports",
        "--per-rank yes": "the magnitude belongs to all ranks of a module: none has a price alone",
    },
    "asymmetry": {"--delta-ratio": PLAIN, "--per-rank yes": HALF, "--proxy fisher": NO_CHANNEL},
    "lora_xs": {
        "--delta-ratio": "A and B are made from W, which has to stand still",
        "--per-rank yes": "R mixes the ranks: none can be off alone",
        "--proxy fisher": NO_CHANNEL,
    },
    "sbora_fa": {"--delta-ratio": PLAIN, "--per-rank yes": HALF, "--proxy fisher": NO_CHANNEL},
    "sbora_fb": {"--delta-ratio": PLAIN, "--per-rank yes": HALF},
    "prolora": {
        "--delta-ratio": PLAIN,
        "--per-rank yes": "a row of the chunk stands in several ranks: none can be off alone",
        "--proxy fisher": "a row of the chunk stands in several ranks: it is no channel's alone",
    },
    "tied": {**SHARED, "--delta-ratio": PLAIN},
    "condlora": {**SHARED, "--delta-ratio": "A and B are made from W, which has to stand still"},
    "cora": {
        "--delta-ratio": PLAIN,
        "--per-rank yes": "B is frozen, and the same for q, k and v: no rank has a column to train",
    },
    "reslora_input": {"--delta-ratio": "the change of B A is no gradient of W on x alone"},
    "reslora_block": {
        "--delta-ratio": "a pair stands in several modules, and would move several weights",
        "--when-off frozen": IN_NEIGHBOURS,
    },
    "reslora_middle": {
        "--delta-ratio": "the change of B A is no gradient of W on x alone",
        "--per-rank yes": "rank k of a block's A goes through rank k of its neighbours' B",
        "--when-off frozen": IN_NEIGHBOURS,
    },
}
# Their parameters are not r times those of rank 1: there is no equal budget at another r.
NOT_LINEAR_IN_R = ("dora", "lora_xs", "prolora", "tied")


def refuse_incompatible(args):
    """Raises ValueError where --adapter and another flag do not go together, with the reason.

    Args:
        args: dict flag (with _ for -) -> value.
    """
    adapter = args["adapter"]
    if adapter != "lora" and not args["targets"]:
        raise ValueError(f"--adapter {adapter} needs --targets: it stands on linear layers alone")
    for feature, reason in INCOMPATIBLE.get(adapter, {}).items():
        flag, _, value = feature.partition(" ")
        got = args[flag[2:].replace("-", "_")]
        if got == value if value else got:
            raise ValueError(f"--adapter {adapter} does not go with {feature}: {reason}")
