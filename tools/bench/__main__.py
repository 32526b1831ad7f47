"""Benchmarks, one command each, a table and a picture: python tools/bench.py train --data-dir DIR

    train      pairs per second beside transformers + PEFT, and beside the matrix products alone
    scale      time and memory over sequence length, batch, depth and width, beside PEFT
    memory     peak memory of training beside PEFT
    score      what each proxy costs, and the share of scoring in a HeteroLoRA run
    agreement  how many scored batches choose what 32 choose, in real runs
    delta      what Delta-LoRA costs beside LoRA

The peers (tests/peers/requirements.txt) are needed for train, scale and memory. How it is
measured: timing.py.
"""

import argparse
import sys
from pathlib import Path

from tools.bench import delta, score, training


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["train", "scale", "memory", "score", "agreement", "delta"]
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--task", default="mrpc", help="of train.py (default: mrpc)")
    parser.add_argument("--data-dir", help="of train.py")
    parser.add_argument("--seeds", default="0,1,2", help="of agreement (default: 0,1,2)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="for the picture")
    args = parser.parse_args(argv)
    try:
        if args.rounds < 3:
            raise ValueError(f"--rounds is {args.rounds}, allowed: 3 or more")
        args.out.mkdir(parents=True, exist_ok=True)
        task = (args.task, args.data_dir)
        if args.what == "scale":
            lines = training.scale(args.rounds, args.out)
        elif args.what == "delta":
            lines = delta.delta(args.rounds, args.out)
        elif args.what == "score":
            lines = score.score(args.rounds, args.out, *task)
        elif args.what == "agreement":
            lines = score.agreement(args.out, *task, [int(s) for s in args.seeds.split(",")])
        else:
            lines = getattr(training, args.what)(args.rounds, args.out, *task)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"bench.py: {error}: pip install -r tests/peers/requirements.txt",
            file=sys.stderr,
        )
        return 2
    print("\n".join([*lines, str(args.out / f"bench-{args.what}.png")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
