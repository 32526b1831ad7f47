"""Benchmarks, one command each, a table and a picture: python -m tools.bench train --data-dir DIR

    train      pairs per second beside transformers + PEFT, and beside the matrix products alone;
               with --model smollm2-q4 tokens per second of a language model
    memory     peak memory of training beside PEFT, of either model
    generate   tokens per second of a language model beside transformers
    scale      time and memory over sequence length, batch, depth and width, beside PEFT
    score      what each proxy costs, and the share of scoring in a HeteroLoRA run
    agreement  how many scored batches choose what 32 batches choose, in real runs
    delta      what Delta-LoRA costs beside LoRA
    relatives  what each method of relatives/ costs beside LoRA
    base       a base in bfloat16 beside one in float32: time and memory of a training step
    shard      a base that is spread over two processes beside a whole one: memory of a process

How times are taken is in timing.py, how memory is measured in peak.py. The peers
(tests/peers/requirements.txt) are needed for train, memory, scale and generate.

What this file does not do: measure anything.
"""

import argparse
import sys
from pathlib import Path

from support.errors import one_line
from support.flags import Parser
from tools.bench import delta, language, large, relatives, score, training


def at_least_three(text):
    """A number of rounds: with fewer than three, a median and its range say nothing."""
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"is {text}, allowed: an integer, 3 or more")
    return int(text)


def seeds(text):
    """Integers, separated by commas."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"is {text}, allowed: integers such as 0,1,2")
    return [int(part) for part in text.split(",")]


def model(text):
    """One of the two that the sides are compared on."""
    if text not in ("minilm", language.NAME):
        raise argparse.ArgumentTypeError(f"is {text}, allowed: minilm, {language.NAME}")
    return text


OPTIONS = {  # name -> (kind, default, help)
    "rounds": (at_least_three, 5, "counted rounds (default: 5)"),
    "model": (model, "minilm", f"minilm, on a task; or {language.NAME}, on data/describe"),
    "task": (str, None, "as of train.py (default: mrpc)"),
    "data_dir": (str, None, "as of train.py"),
    "seeds": (seeds, [0, 1, 2], "of the runs (default: 0,1,2)"),
}
BENCHMARKS = {  # name -> (function, the options that it takes)
    "train": (training.train, ("rounds", "model", "task", "data_dir")),
    "memory": (training.memory, ("rounds", "model", "task", "data_dir")),
    "generate": (language.generate, ("rounds",)),
    "scale": (training.scale, ("rounds",)),
    "score": (score.score, ("rounds", "task", "data_dir")),
    "agreement": (score.agreement, ("task", "data_dir", "seeds")),
    "delta": (delta.delta, ("rounds",)),
    "relatives": (relatives.relatives, ("rounds",)),
    "base": (large.base, ("rounds",)),
    "shard": (large.shard, ("rounds",)),
}
OF_LANGUAGE = {"train": language.train, "memory": language.memory}  # with --model smollm2-q4


def parse(argv):
    """The command line; each benchmark has the options that it takes, and no others."""
    parser = Parser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (_, options) in BENCHMARKS.items():
        command = commands.add_parser(name)
        for option in options:
            kind, default, text = OPTIONS[option]
            flag = f"--{option.replace('_', '-')}"
            command.add_argument(flag, type=kind, default=default, metavar="X", help=text)
        command.add_argument(
            "--out", type=Path, default=Path("runs/bench"), help="folder for the picture"
        )
    return parser.parse_args(argv)


def chosen(args):
    """(function, what it takes). ValueError: an option that would do nothing."""
    function, options = BENCHMARKS[args.what]
    given = {name: getattr(args, name) for name in options}
    if given.pop("model", "minilm") != "minilm":
        if args.task or args.data_dir:
            raise ValueError(f"--task and --data-dir do nothing with --model {args.model}")
        return OF_LANGUAGE[args.what], {"rounds": args.rounds}
    if "task" in given:
        given["task"] = args.task or "mrpc"
    return function, given


def main(argv=None):
    """Exit code: 0 done, 2 bad input."""
    try:
        args = parse(argv)
        picture = args.out / f"bench-{args.what}.png"
        function, given = chosen(args)
        args.out.mkdir(parents=True, exist_ok=True)
        lines = function(picture=picture, **given)
    except ImportError as error:
        print(f"tools.bench: {error}: pip install -r tests/peers/requirements.txt", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        print(f"tools.bench: {one_line(error, 600)}", file=sys.stderr)
        return 2
    print("\n".join([*lines, str(picture)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
