"""Run several settings over several seeds and print mean ± sd: python tools/compare.py ARM …
[options]

    python tools/compare.py "LoRA: --preset lora" "HeteroLoRA:" --seeds 0,1,2 --out runs/table
    --flags "--task mrpc"

An arm is NAME: FLAGS of train.py; --flags go to all of them. Seed by seed, arms in turn, so that a
machine whose speed drifts is fair to all. A run that is finished in --out is read, not repeated.
The metric is the last epoch's, not the best: choosing the epoch on the data that is reported
flatters every method.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runs

ROOT = Path(__file__).resolve().parents[1]


def result(folder, flags):
    """The "done" line of a run, run first if it is not there."""
    done = [e for e in runs.read_log(folder) if e["event"] == "done"]
    if not done:
        going_on = ["--resume", str(folder)] if (folder / "checkpoint.pt").is_file() else None
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *(going_on or [*flags, "--out", str(folder)]),
        ]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {finished.stderr.strip().splitlines()[-1]}")
        done = [e for e in runs.read_log(folder) if e["event"] == "done"]
    return done[0]


def table(arms, results, metric):
    """Lines of a Markdown table."""
    lines = [
        "| arm | trainable | last epoch, per seed | mean ± sd | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in arms:
        values = [r[metric] for r in results[name]]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        per_seed = ", ".join(f"{v:.3f}" for v in values)
        seconds = statistics.median(r["seconds"] for r in results[name])
        count = results[name][0]["trainable"]
        lines.append(
            f"| {name} | {count['adapters']:,} + {count['head']:,} | {per_seed} | "
            f"{statistics.mean(values):.3f}{spread} | {seconds:.0f} |"
        )
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="+", metavar="ARM", help='"NAME: FLAGS of train.py"')
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--flags", default="", help="flags of train.py for every arm")
    parser.add_argument("--metric", default="accuracy", help="default: accuracy")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that gets a run folder per run"
    )
    args = parser.parse_args(argv)
    arms = dict(arm.split(":", 1) for arm in args.arms)
    results = {name: [] for name in arms}
    try:
        for seed in args.seeds.split(","):
            for name, flags in arms.items():
                folder = args.out / f"{name.strip().replace(' ', '-')}-{seed}"
                given = [*shlex.split(args.flags), *shlex.split(flags), "--seed", seed]
                results[name].append(result(folder, given))
                print(f"{name}, seed {seed}: {results[name][-1][args.metric]:.4f}", flush=True)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(arms, results, args.metric)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
