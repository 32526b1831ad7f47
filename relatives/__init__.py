"""The relatives: other low-rank methods that the two papers are read beside, one a file.

Three kinds, three small interfaces. To add one is a file and its line in METHODS.

    kind       | what METHODS names
    adapter    | a LoRALayer of another form, which lora.inject puts on the targets
    optimizer  | a function (model, lr, weight_decay) -> torch.optim.Optimizer
    allocator  | a class with before_step() and after_step() around the optimizer's step, state()
               | and load() for the checkpoint, adapter (whose ranks it allocates), single_ranks

An adapter has the arguments of LoRALayer and overrides what differs: branch (the A and B of now) or
forward, delta_w (what it adds to the weight), factors (the tensors that train), pair (what it
exports as), from_zero (the factor that starts at zero, if that is not B). Where modules share
something, its static method connect(layers, seed) is called once, before they are put in their
places. Of a shared factor each of its modules has the parameter itself in factors(): it is stored,
stepped and counted once. A branch that is no matrix on x says why in `unmergeable`, and one that
takes from other blocks' inputs has `every_token`.

Two of them have a second file: adalora.py its module in triplets.py, alora.py its decision in
exchange.py. single_ranks.py, with rank_scores.py, rank_budget.py and rank_steps.py, is HeteroLoRA's
own: --per-rank yes. incompatible.py says which method does not go with which flag.

What this package does not do: import transformers or PEFT, or need a line of its own in train.py.
"""

from lora import LoRALayer
from relatives import lora_plus, lora_pro, lora_rite, riemannian
from relatives.adalora import AdaLoRA
from relatives.alora import ALoRA
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
    "optimizer": {
        "adamw": adamw,
        "loraplus": lora_plus.optimizer,
        "riemannian": riemannian.optimizer,
        "lora_pro": lora_pro.optimizer,
        "lora_rite": lora_rite.optimizer,
    },
    "allocator": {"adalora": AdaLoRA, "alora": ALoRA},
}
# Their parameters are not r times those of rank 1: there is no equal budget at another r.
NOT_LINEAR_IN_R = ("dora", "lora_xs", "prolora", "tied")
