"""Hold an implementation against ours: python -m tools.oracle check --candidate FILE

    check       calls the candidate's functions with the stored inputs, in float64 and float32, and
                prints case, error, allowed error, verdict and, for a failure, the likely cause
    interface   prints what a candidate may define: arguments, shapes, results
    export      writes all cases anew; the same export gives the same bytes

Exit codes of check: 0 all that is offered passes; 1 something fails; 2 bad input; 3 nothing that
was asked for is offered. A page about it: docs/oracle.md.

What this file does not do: know a function of the interface (ours.py), compare (check.py).
"""

import argparse
import sys
from pathlib import Path

from support.errors import one_line
from support.flags import Parser
from tools.oracle import check, golden

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def main(argv=None):
    """Returns the exit code."""
    parser = Parser(
        prog="python -m tools.oracle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("check", help="compare a candidate with the cases")
    folder = "folder of cases (default: tests/golden)"
    into.add_argument("folder", type=Path, nargs="?", default=GOLDEN, help=folder)
    into.add_argument("--candidate", required=True, help="a Python file")
    into.add_argument("--only", metavar="NAME", help="one function, or one case")
    commands.add_parser("interface", help="print what a candidate may define")
    out = commands.add_parser("export", help="write all cases")
    out.add_argument("folder", type=Path)
    try:
        args = parser.parse_args(argv)
        if args.command == "interface":
            print(check.interface())
            return 0
        if args.command == "export":
            print(f"{golden.export(args.folder)} cases in {args.folder}")
            return 0
        rows = check.check(args.folder, check.load_candidate(args.candidate), args.only)
    except (ValueError, OSError) as error:
        print(f"oracle: {one_line(error, 600)}", file=sys.stderr)
        return 2
    print("\n".join(check.table(rows)))
    verdicts = {row.verdict for row in rows}
    return 1 if "FAIL" in verdicts else 0 if "pass" in verdicts else 3


if __name__ == "__main__":
    sys.exit(main())
