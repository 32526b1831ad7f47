"""Under torchrun, or alone: a few steps in float64, then what came of them, to a file.

python -m torch.distributed.run --nproc-per-node 2 tests/two_processes.py OUT FLAGS …
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distributed
import flags
import lora
import state
import train


def main(out, argv):
    distributed.start()
    run = state.set_up(flags.parse_flags(argv))
    run.model.double()
    losses = []
    for epoch in range(2):
        groups = train.epoch_steps(run, epoch)
        for i, group in enumerate(groups):
            if run.plan and run.plan.due(run.step, i, len(groups)):
                train.allocate_now(run, lambda text: None)
            losses.append(train.train_step(run, group, 0.01))
            run.step += 1
    result = {
        "losses": losses,
        "metrics": train.evaluate(run.model, run.task, run.dev),
        "parameters": {n: p.detach() for n, p in lora.trainable(run.model).items()},
        "weights": {n: p.detach() for n, p in run.model.named_parameters() if "base" in n},
        "history": run.plan.history if run.plan else [],
    }
    torch.save(result, f"{out}.{distributed.rank()}")
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
