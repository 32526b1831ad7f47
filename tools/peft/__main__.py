"""PEFT adapters out and in: python -m tools.peft export RUN DIR | import DIR OUT | inspect DIR

    export RUN DIR     a finished run as a PEFT adapter folder
    import DIR OUT     a PEFT folder (LoRA, DoRA, AdaLoRA) as our adapter.safetensors, checked
                       against --model; with --task, its metrics on the development set
    inspect DIR        module, rank, alpha, scale, parameters and ||delta W||_F, from config and
                       tensors; exit code 1 where these disagree, or --model with them

What this file does not do: the formats themselves (writing.py, config.py, reading.py).
"""

import argparse
import sys
from pathlib import Path

from support import glue
from support.errors import one_line
from support.flags import Parser
from tools.peft import commands, writing


def parse(argv):
    parser = Parser(
        prog="python -m tools.peft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="command", required=True)
    out = kinds.add_parser("export", help="RUN -> PEFT adapter folder")
    out.add_argument("run", type=Path)
    out.add_argument("folder", type=Path)
    out.add_argument("--pad", action="store_true", help="one rank for all modules, with zeros")
    what = out.add_mutually_exclusive_group()
    what.add_argument("--drop-shortcuts", action="store_true", help="leave out shortcuts of zero")
    what.add_argument("--keep-shortcuts", action="store_true", help="for a model after prepare()")
    into = kinds.add_parser("import", help="PEFT adapter folder -> OUT/adapter.safetensors")
    into.add_argument("folder", type=Path)
    into.add_argument("out", type=Path)
    into.add_argument("--model", default="minilm", help="as of train.py (default: minilm)")
    into.add_argument("--task", choices=list(glue.TASKS), help="evaluate on this task too")
    into.add_argument("--data-dir", help="as of train.py")
    look = kinds.add_parser("inspect", help="a table; exit code 1 on a disagreement")
    look.add_argument("folder", type=Path)
    look.add_argument("--model", help="as of train.py: compare with its shapes too")
    return parser.parse_args(argv)


def main(argv=None):
    """Exit code: 0 done; 1 inspect found a disagreement; 2 bad input."""
    try:
        args = parse(argv)
        if args.command == "export":
            shortcuts = (args.drop_shortcuts, args.keep_shortcuts)
            writing.export(args.run, args.folder, args.pad, *shortcuts)
            print("\n".join([*commands.inspect(args.folder)[0], str(args.folder)]))
        elif args.command == "import":
            given = (args.model, args.task, args.data_dir)
            print(commands.import_folder(args.folder, args.out, *given))
        else:
            lines, agree = commands.inspect(args.folder, args.model)
            print("\n".join(lines))
            return 0 if agree else 1
    except (ValueError, OSError) as error:
        print(f"tools.peft: {one_line(error, 600)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
