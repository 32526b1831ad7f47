"""The released allocation decisions, reproduced: python tests/conformance.py recorded.jsonl

Each line is one reallocation that the authors' runs recorded: scores (layer, module, value), the
mode, p, and what was switched on. allocate.keep_top must choose the same set. Exit code 1 if one
differs.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import allocate


def main(argv=None):
    """Exit code: 0 all are reproduced; 1 one is not; 2 no file of decisions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recorded", type=Path, help="one decision a line")
    path, results = parser.parse_args(argv).recorded, collections.defaultdict(lambda: [0, 0])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        print(f"conformance.py: {error}", file=sys.stderr)
        return 2
    for line in lines:
        decision = json.loads(line)
        scores = {f"layers.{i}.{module}": value for i, module, value in decision["scores"]}
        expected = {f"layers.{i}.{module}" for i, module in decision["on"]}
        on = allocate.keep_top(scores, decision["p"], together=decision["mode"] != "separated")
        result = results[decision["mode"], decision["p"], len(scores)]
        result[0] += on == expected
        result[1] += 1
    for (mode, p, n), (same, total) in sorted(results.items()):
        print(f"{mode:<10} keep {p}, {n:3} modules: {same} of {total} decisions reproduced")
    same, total = (sum(r[i] for r in results.values()) for i in (0, 1))
    print(f"{same} passed, {total - same} failed")
    return 0 if same == total > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
