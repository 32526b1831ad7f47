"""The relatives: other low-rank methods that the two papers are read beside, one a file.

Three kinds, three small interfaces. To add one is a file and its line in METHODS.

    kind       | what METHODS names
    adapter    | a LoRALayer of another form, which lora.inject puts on the targets
    optimizer  | a function (model, lr, weight_decay) -> torch.optim.Optimizer
    allocator  | a class with before_step() and after_step() around the optimizer's step

An adapter has the arguments of LoRALayer and overrides what differs: forward, delta_w (what it adds
to the weight), factors (the tensors that train), pair (what it exports as). Where modules share
something, its static method connect(layers, seed) is called once, when all are in their places.

single_ranks.py is HeteroLoRA's own: --per-rank yes.

What this package does not do: import transformers or PEFT, or need a line of its own in train.py.
"""

from lora import LoRALayer
from relatives.plain import adamw

METHODS = {  # kind -> name -> method
    "adapter": {"lora": LoRALayer},
    "optimizer": {"adamw": adamw},
    "allocator": {},
}
