"""What the texts say is so: README.md, docs/, and the docstring at the head of every file.

    a file, a function, a test, a flag that is named     exists
    a formula of docs/equations.md                       stands in the function that is named
    a command in a code block, or in a head              parses, without being run
    a link, a picture                                    leads somewhere
    a number that can be counted, a version              is what it is
    a wrong variant of tests/mutants.py                  fits the code, and names a test
    the size guides                                      hold
    a table of a study                                   is what the report of its lines says

Names are looked up in the syntax trees of the files; only the command lines are parsed by the
programs' own parsers. Nothing is trained, loaded or fetched.

What this file does not do: look at web addresses, judge prose, run the examples of the pages
(test_extending.py does).
"""

import argparse
import ast
import builtins
import collections
import functools
import importlib
import io
import itertools
import re
import shlex
import sys
import tokenize
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from support import flags, run_folder
from tools import ablation, compare_report

ROOT = Path(__file__).parents[1]
PARTS = ("support", "relatives", "tools", "tests", "docs")  # folders with code or text
READERS = (
    "mine.py",
    "exercises.py",
)  # what docs/oracle.md and docs/exercises.md tell a reader to make
MODULES = [p for p in ROOT.glob("*.py") if p.name not in READERS]
CODE = sorted([*MODULES, *(p for part in PARTS for p in (ROOT / part).rglob("*.py"))])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = {  # lines of code
    "model.py": 330,
    "incompatible.py": 105,  # a table: a line for a reason
}
GUIDE, TOGETHER, RELATIVE, FUNCTION = 250, 1400, 60, 50
README_LINES, COLUMNS = 150, 100
PAGES_PROMISED = (
    *("equations", "deviations", "delta-lora", "results", "performance", "reliability", "oracle"),
    *("peft", "cuda", "extending", "exercises", "causal"),
)

# What is named and is not ours.
FOREIGN_FILES = {
    "mine.py",
    "dyrealloc_callback.py",
    "realloc_lora_rank.py",
    "snip.py",
    "synflow.py",
}
FOREIGN_FLAGS = {
    "--nproc-per-node", "--nnodes", "--max-restarts", "--standalone", "--rdzv-endpoint",  # torchrun
    "--python", "--with-requirements", "--with", "--no-project",  # uv
    "--quiet", "--help", "--version", "--upgrade",  # everywhere
}  # fmt: skip
SUFFIXES = r"py|md|toml|png|txt|tsv|jsonl"


# ------------------------------------------------------------------------------------------ reading


def none(wrong):
    """Fails with all that is wrong, a line each."""
    assert not wrong, "\n" + "\n".join(wrong)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def head(path):
    """The docstring at the head of a file, or ""."""
    return ast.get_docstring(tree(path), clean=False) or ""


@functools.cache
def names(path):
    """All that a file defines: functions, classes, constants, fields and attributes of self."""
    found = set()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")
                continue
            if isinstance(child, ast.Assign | ast.AnnAssign):
                targets = getattr(child, "targets", None) or [child.target]
                for target in (t for one in targets for t in ast.walk(one)):
                    if isinstance(target, ast.Attribute) or not prefix or prefix[0].isupper():
                        found.add(prefix + getattr(target, "attr", getattr(target, "id", "")))
            visit(child, prefix)

    visit(tree(path), "")
    return found


def defines(path, name):
    """Whether a file defines "f", "Class.method", or a method or attribute by its last word."""
    return any(n == name or n.endswith("." + name) for n in names(path))


@functools.cache
def files_called(name):
    """All files of ours with this name, or with this end of a path."""
    if name.startswith("/") or ".." in name:
        return []
    found = [p for p in CODE if f"/{relative(p)}".endswith("/" + name)]
    return found or [ROOT / name] * (ROOT / name).is_file()


@functools.cache
def with_docstrings(path):
    """The module, classes and functions of a file, as nodes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def docstring_lines(path):
    """(number of its first line, text) of every docstring in a file."""
    for node in with_docstrings(path):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", 0), str):
            yield first.lineno, first.value.value


@functools.cache
def lines_of_code(path):
    """The numbers of the lines that hold code: no docstring, no comment, not blank."""
    lines, docstrings = set(), set()
    for first, text in docstring_lines(path):
        docstrings |= set(range(first, first + text.count("\n") + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


@functools.cache
def page(path):
    """(prose, blocks) of a Markdown page: its text without code blocks, [(language, lines)]."""
    prose, blocks, fence, before, indented = [], [], False, "", False
    for line in path.read_text().splitlines():
        starts = line.startswith("    ") and not before.strip()  # else: an item of a list goes on
        indented = not fence and line.startswith("    ") and (indented or starts)
        if line.lstrip().startswith("```"):
            fence = not fence
            if fence:
                blocks.append((line.strip("` "), []))
        elif fence or indented:
            if indented and starts:
                blocks.append(("", []))
            blocks[-1][1].append(line[4:] if indented else line)
        else:
            prose.append(line)
        before = line
    return "\n".join(prose), blocks


def spans(path):
    """The `code` in a page's prose, a bar in a table's cell unescaped."""
    return [s.replace("\\|", "|") for s in re.findall(r"`([^`\n]+)`", page(path)[0])]


def texts():
    """(where, text) of all that is checked for names: pages as a whole, heads of files."""
    for path in PAGES:
        yield relative(path), path.read_text()
    for path in CODE:
        yield relative(path), head(path)


# -------------------------------------------------------------------------- files, functions, tests


def placeholder(name):
    """NAME, RUN/x.png, test_*.py, …: no file's name."""
    return re.search(r"\b[A-Z]{2,}\b(?!\.md)|[*<>{}…]|\b[A-Z]\b", name) is not None


def missing_files(text, here):
    """The files that a text names and that are not there."""
    for name in re.findall(rf"(?<![\w/.*<{{-])[\w./-]+\.(?:{SUFFIXES})\b(?!\()", text):
        local = "/" not in name and name.rpartition(".")[2] not in ("py", "md", "toml")
        if placeholder(name) or name in FOREIGN_FILES or Path(name).name in FOREIGN_FILES or local:
            continue  # a bare train.tsv, metrics.jsonl, adapter.png is a run's or a user's
        outside = name.startswith(("runs/", "/", "~", ".venv/", "http"))
        found = [p for p in PAGES if p.name == name] or files_called(name)
        if not (outside or found or (ROOT / here / name).exists() or (ROOT / name).exists()):
            yield name


def test_every_file_that_is_named_exists():
    wrong = []
    for where, text in texts():
        text = re.sub(r"https?://\S+", "", text)
        wrong += [f"{where}: {name}" for name in missing_files(text, Path(where).parent)]
    none(wrong)


def test_every_function_that_follows_a_file_exists():
    """In the form `lora.py` `inject`, `merge`: each is defined in that file."""
    wrong = []
    for path in PAGES:
        pattern = r"`([\w/.-]+\.py)`((?:(?:,|,? and|:)?\s+`[A-Za-z_][\w.]*(?:\(\))?`)+)"
        for file, rest in re.findall(pattern, page(path)[0]):
            for name in re.findall(r"`([\w.]+)", rest):
                found = files_called(file)
                known = name.endswith(".py") or any(defines(p, name) for p in found)
                if not known and file not in FOREIGN_FILES:
                    wrong.append(f"{relative(path)}: {file} has no {name}")
    none(wrong)


def modules():
    """{"lora": path, …} of the root, support/ and relatives/: what a text calls by module.name."""
    folders = (ROOT, ROOT / "support", ROOT / "relatives")
    return {p.stem: p for p in CODE if p.parent in folders and p.stem != "__init__"}


def test_every_name_in_a_module_exists():
    """lora.inject in a page's code, in a head: defined in lora.py (model.eval is torch's)."""
    wrong, known = [], modules()
    for path in [*PAGES, *CODE]:
        blocks = [line for _, lines in page(path)[1] for line in lines] if path in PAGES else []
        sources = [*spans(path), *blocks] if path in PAGES else [head(path)]
        for text in sources:
            for module, name in re.findall(
                r"(?<![\w./-])([a-z_]+)\.([A-Za-z_]\w*)\b(?!\.pt)", text
            ):
                if module not in known or re.fullmatch(rf"{SUFFIXES}|json|pt|safetensors", name):
                    continue
                if not (defines(known[module], name) or hasattr(torch.nn.Module, name)):
                    wrong.append(f"{relative(path)}: {module}.{name}")
    none(wrong)


def test_every_call_in_prose_exists():
    """`back_to_pretrained()` in a page: some file of ours defines it, or torch, or Python."""
    wrong = []
    for path in PAGES:
        for span in spans(path):
            for name in re.findall(r"^(?:\w+\.)*([a-z_]\w*)\(", span):
                torchs = any(
                    hasattr(t, name) for t in (builtins, torch, torch.nn.Module, torch.Tensor)
                )
                if not torchs and not any(defines(p, name) for p in CODE):
                    wrong.append(f"{relative(path)}: {span}")
    none(wrong)


def test_every_test_that_is_named_exists():
    wrong = []
    for where, text in texts():
        for file, name in re.findall(r"(\w+\.py)::(\w+)", text):
            if not any(defines(p, name) for p in files_called(file)):
                wrong.append(f"{where}: {file}::{name}")
        for name in re.findall(r"(?<![:\w/])(test_\w+)\b(?!\.py|\w)", text):
            if not any(defines(p, name) or p.stem == name for p in CODE):
                wrong.append(f"{where}: {name}")
    none(wrong)


# ------------------------------------------------------------------------------------ command lines


class Captured(Exception):
    """Raised in place of parsing: carries a program's parser."""


@functools.cache
def parser_of(module):
    """The argparse parser of a program in tools/, or of train.py, without running anything."""

    def stop(parser, *_):
        raise Captured(parser)

    original, argv = argparse.ArgumentParser.parse_known_args, ["nothing"]
    argparse.ArgumentParser.parse_known_args = stop
    try:
        main = flags.parse_flags if module == "train" else importlib.import_module(module).main
        main(argv)
    except Captured as captured:
        return captured.args[0]
    finally:
        argparse.ArgumentParser.parse_known_args = original
    raise AssertionError(f"{module} parses its command line without argparse")


def options(parser):
    """All flags of a parser and of its commands."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        for command in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            found |= options(command)
    return found


def programs():
    """Module names of the programs in tools/: what has a main(argv)."""
    found = []
    for path in CODE:
        for node in tree(path).body if path.is_relative_to(ROOT / "tools") else ():
            if getattr(node, "name", "") == "main" and [a.arg for a in node.args.args] == ["argv"]:
                found.append(relative(path).removesuffix(".py").replace("/", "."))
    return found


def of_tests():
    """Flags of the programs in tests/, which may need the peers: read off their text."""
    return {
        flag
        for path in CODE
        if path.is_relative_to(ROOT / "tests") and "main" in names(path)
        for flag in re.findall(r"[\"'](--[a-z-]+)[\"']", path.read_text())
    }


def test_every_flag_that_is_named_exists():
    known = FOREIGN_FLAGS | of_tests() | options(parser_of("train"))
    known = known.union(*(options(parser_of(program)) for program in programs()))
    wrong = []
    for where, text in texts():
        for flag in re.findall(r"(?<![\w|-])--[a-z][\w-]*", re.sub(r"\]\([^)]*\)", "", text)):
            if flag not in known:
                wrong.append(f"{where}: {flag}")
    none(wrong)


def commands(lines):
    """The commands in the lines of a code block, as lists of words."""
    text = "\n".join(lines).replace("\\\n", " ")
    for line in text.splitlines():
        line = re.sub(r"\s+(->|2?>|\||<).*$", "", line.strip().removeprefix("$ "))
        try:
            words = shlex.split(re.sub(r"[\[\]…]|\.\.\.", " ", line), comments=True)
        except ValueError:
            continue  # an apostrophe in a program's output
        part = []
        for word in [*words, "&&"]:
            if word in ("&&", ";"):
                while part and re.fullmatch(r"[A-Z_]+=\S*", part[0]):
                    part = part[1:]
                if part:
                    yield part
                part = []
            else:
                part.append(word)


def in_heads():
    """(where, words) of the commands at the head of a file: after a colon, or indented."""
    for path in CODE:
        for line in head(path).splitlines():
            found = re.search(r"(?:^ {4}|: )((?:python|pytest|torchrun) .*)$", line)
            if found:
                yield relative(path), next(commands([re.split(r" {2,}| \(|, ", found[1])[0]]))


def in_pages():
    """(where, words) of the commands in the code blocks of the pages, and in .ci/run."""
    for words in commands((ROOT / ".ci" / "run").read_text().splitlines()):
        yield ".ci/run", words
    for path in PAGES:
        for language, lines in page(path)[1]:
            if language in ("", "sh", "bash", "console", "shell"):
                for words in commands(lines):
                    yield relative(path), words


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder that --resume can read."""
    folder = tmp_path_factory.mktemp("run")
    content = {"flags": flags.stored(flags.parse_flags([])), "versions": {}}
    run_folder.write_json(folder / "config.json", content)
    return str(folder)


def refusal(words, run):
    """Why a command cannot be run as it stands; None: nothing is wrong, or it is not ours."""
    program, *rest = words
    program = Path(program).name
    for option, file in itertools.pairwise(rest):
        if option in ("-r", "--with-requirements") and not (ROOT / file).is_file():
            return f"no {file}"
    if program in ("uv", "torchrun"):
        starts = [i for i, w in enumerate(rest) if w in ("python", "pytest", "train.py")]
        if not starts:
            return None if program == "uv" else "no program"
        return refusal(["python"] * (rest[starts[0]] == "train.py") + rest[starts[0] :], run)
    if program == "pytest":
        files = [w.split("::")[0] for w in rest if "/" in w or w.endswith(".py")]
        return next((f"no {f}" for f in files if not (ROOT / f).exists()), None)
    if program not in ("python", "python3") or not rest:
        return None
    if rest[0] == "-c":
        return ast.parse(rest[1]) and None
    if rest[0] == "-m":
        module, rest = rest[1], rest[2:]
        if module == "pytest":
            return refusal(["pytest", *rest], run)
        if module.split(".")[0] in sys.stdlib_module_names or module == "pip":
            return None
    else:
        if not (ROOT / rest[0]).is_file():
            return f"no {rest[0]}"
        module, rest = rest[0].removesuffix(".py").replace("/", "."), rest[1:]
        source = (ROOT / words[1]).read_text()
        ours = re.search(r"^(from|import) (support|tools|train|allocate|lora)\b", source, re.M)
        if "/" in words[1] and ours and "sys.path" not in source:
            return f"{words[1]} finds its imports only as python -m {module}"
    return parsed(module, [{"RUN": run, "S": "0", "N": "1"}.get(w, w) for w in rest])


def parsed(module, argv):
    """Why a program refuses these arguments, or None; module as in python -m."""
    if module.startswith("tests."):
        unknown = {w.split("=")[0] for w in argv if w.startswith("--")} - of_tests()
        return f"unknown {sorted(unknown)}" if unknown else None
    if (ROOT / module.replace(".", "/")).is_dir():
        module += ".__main__"
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return f"no module {module}"
    try:
        flags.parse_flags(argv) if module == "train" else parser_of(module).parse_args(argv)
    except (ValueError, OSError, SystemExit) as error:
        return "" if getattr(error, "code", 1) == 0 else f"refused: {error}"


def test_every_command_parses(run, capsys):
    wrong = [
        f"{where}: {shlex.join(words)}: {reason}"
        for where, words in (*in_pages(), *in_heads())
        if (reason := refusal(words, run))
    ]
    capsys.readouterr()
    none(wrong)


def test_commands_are_found_and_refused_where_they_are_wrong(run, capsys):
    """The checks above can fail: a wrong flag, value, file, module, missing command."""
    found = commands(["A=1 python train.py --r 8 \\", "  --lr 1 && pytest -q  # fast", "epoch 1:"])
    assert list(found) == [
        ["python", "train.py", "--r", "8", "--lr", "1"],
        ["pytest", "-q"],
        ["epoch", "1:"],
    ]
    for command in (
        "python train.py --rr 8", "python train.py --lr x", "python trainer.py",
        "pytest tests/no.py", "python -m tools.nothing", "python tools/faults.py --kills x",
        "python -m tools.peft export", "pip install -r nothing.txt", "python -m tools.bench bake",
        "torchrun --nproc-per-node 2 train.py --preset no",
        "uv run --with-requirements no.txt train.py",
    ):  # fmt: skip
        assert refusal(command.split(), run), command
    for command in (
        "python train.py --resume RUN --eval-only",
        "torchrun train.py --r 2",
        "uv sync",
    ):
        assert refusal(command.split(), run) is None, command
    capsys.readouterr()


def test_python_in_the_pages_is_python():
    for path in PAGES:
        for language, lines in page(path)[1]:
            if language == "python":
                compile("\n".join(lines), relative(path), "exec")


# ------------------------------------------------------------------------------- links and pictures


def anchors(path):
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page(path)[0], re.M)
    return {
        re.sub(r"[^\w\- ]", "", t.replace("`", "")).strip().lower().replace(" ", "-")
        for t in titles
    }


def test_links_and_pictures_lead_somewhere():
    wrong = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page(path)[0]):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            if not place.exists():
                wrong.append(f"{relative(path)}: {target}")
            elif anchor and place.suffix == ".md" and anchor not in anchors(place):
                wrong.append(f"{relative(path)}: no heading {target}")
    none(wrong)


def test_every_page_and_picture_can_be_reached_from_the_readme():
    linked, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        for target in re.findall(r"\]\(([^)#\s]+)", page(path)[0]):
            place = (path.parent / target).resolve()
            if place not in linked and place.is_relative_to(ROOT) and place.exists():
                linked.add(place)
                waiting += [place] if place.suffix == ".md" else []
    there = {*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.png")}
    assert sorted(map(relative, there - linked)) == []
    promised = {ROOT / "docs" / f"{name}.md" for name in PAGES_PROMISED}
    assert sorted(map(relative, promised - linked)) == []


# -------------------------------------------------------------------------------- numbers, versions


def test_the_readme_is_short_and_no_page_is_wide():
    """No line over 100 columns, but for rows of tables, output, and what cannot be broken."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
    wrong = []
    for path in PAGES:
        for i, line in enumerate(path.read_text().splitlines(), 1):
            free = line.startswith("|") or "FAIL  likely" in line or " " not in line.strip()
            if len(line) > COLUMNS and not free:
                wrong.append(f"{relative(path)}:{i} has {len(line)} columns")
    none(wrong)


@functools.cache
def mutants():
    """[(file, old, new, what is wrong, test)] of tests/mutants.py, read and not imported."""
    body, plain = [], (ast.Constant, ast.Tuple, ast.List)
    for node in tree(ROOT / "tests" / "mutants.py").body:
        named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name | ast.Tuple)
        body += [node] * (named and isinstance(node.value, plain))
    space = {}
    exec(compile(ast.Module(body, []), "mutants.py", "exec"), space)
    return space["MUTANTS"]


def test_every_wrong_variant_fits_the_code_and_names_a_test():
    wrong = []
    for file, old, _, what, where in mutants():
        test, _, function = where.partition("::")
        path = ROOT / "tests" / test
        if (ROOT / file).read_text().count(old) != 1:
            wrong.append(f"{file}: {what}: the line is not there, or twice")
        if not path.is_file() or (function and not defines(path, function)):
            wrong.append(f"{file}: {what}: no test {where}")
    none(wrong)


def counted():
    """{words after a number: what that number is}."""
    proxies = next(
        node.value
        for node in tree(ROOT / "proxies.py").body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PROXIES"
    )
    return {
        "wrong variants": len(mutants()),
        "golden cases": len(list((ROOT / "tests" / "golden").glob("*.json"))),
        "proxies": len(proxies.keys),
        "tasks of GLUE": 9,
    }


def test_numbers_that_can_be_counted():
    wrong = []
    for where, text in texts():
        for words, number in counted().items():
            for said in re.findall(rf"\b(\d[\d,]*) {words}\b", " ".join(text.split())):
                if int(said.replace(",", "")) != number:
                    wrong.append(f"{where}: {said} {words}, there are {number}")
    none(wrong)


@pytest.mark.parametrize("study, page", [("relatives", "relatives.md"), ("mrpc", "results.md")])
def test_the_tables_of_a_study_are_what_its_lines_say(study, page):
    lines = compare_report.read_results(ROOT / "results" / f"{study}.jsonl")
    blocks = "\n".join(compare_report.report(lines)).split("\n\n")
    text = (ROOT / "docs" / page).read_text()
    tables = [block for block in blocks if block.startswith("|")]
    assert tables
    none([table for table in tables if f"\n\n{table}\n\n" not in text])


@functools.cache
def the_study():
    """Of MRPC: (lines, final runs by arm, labels of the test set, text of the page)."""
    lines = compare_report.read_results(ROOT / "results" / "mrpc.jsonl")
    labels = np.frombuffer(lines[0]["labels"].encode(), np.uint8)
    arms = compare_report.finals(lines)
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    return lines, arms, labels, page


def test_differences_that_are_told_beside_the_tables_are_of_the_lines():
    """Mean, interval over seeds, interval over both: with random static, as the page has them."""
    lines, arms, labels, page = the_study()
    told = {  # arm -> what the page says of it beside random static
        "GRAD-NORM dynamic": "{:+.1f} ({:+.1f} … {:+.1f} over seeds, {:+.1f} … {:+.1f} over both)",
        "random dynamic": "{:.1f} points below random static ({:.1f} … {:.1f}, {:.1f} … {:.1f})",
    }
    for arm, text in told.items():
        _, mean, seeds, both = compare_report.compared(arms[arm], arms["random static"], labels)
        mean = abs(mean) if "below" in text else mean
        assert text.format(mean, *seeds, *both) in page
    assert compare_report.report(lines)[-1] in page
    static, dynamic = (arms[f"GRAD-NORM {mode}"] for mode in ("static", "dynamic"))
    assert "the same predictions" in page and len(static) == 10
    assert all(static[s]["predictions"] == dynamic[s]["predictions"] for s in static)
    alone = np.mean([line["test"]["accuracy"] for line in arms["head alone"].values()])
    assert f"the head alone has {100 * alone:.1f} %" in page


def test_what_is_told_of_off_frozen_is_of_the_lines():
    """Differences that no table has, the run that collapsed, what changes, and what is stored."""
    _, arms, labels, page = the_study()
    chance, slot = (arms[f"{name} dynamic, off = frozen"] for name in ("random", "grad_norm_slot"))
    assert len(chance) == len(slot) == 10
    _, mean, seeds, both = compare_report.compared(chance, arms["random dynamic"], labels)
    told = (
        "{:.1f} points better ({:+.1f} … {:+.1f}, {:+.1f} … {:+.1f}), and not below random static"
    )
    assert told.format(mean, *seeds, *both) in page
    _, mean, *intervals = compare_report.compared(chance, arms["random static"], labels)
    assert f"static ({mean:+.1f}, {compare_report.verdict(*intervals)})" in page
    one_class = [seed for seed, line in slot.items() if len(set(line["predictions"])) == 1]
    rest = {seed: line for seed, line in slot.items() if seed not in one_class}
    mean = compare_report.compared(rest, arms["uniform r 2"], labels)[1]
    (seed,) = one_class
    assert (
        f"(seed {seed}) gave every pair the same class; without it the mean is {mean:.1f}" in page
    )
    runs = [[set(on) for _, on in line["decisions"]] for line in slot.values()]
    changed = np.mean([len(b - a) for run in runs for a, b in itertools.pairwise(run)])
    assert f"It exchanges {changed:.1f} of its three modules at a decision" in page
    shares = [np.mean([f"layers.{i}.v_proj" in on for run in runs for on in run]) for i in (1, 2)]
    assert "are on at {:.0%} and {:.0%}".format(*shares).replace("%", " %") in page
    stored = [[line["stored"] / 18432 for line in arm.values()] for arm in (slot, chance)]
    told = "Both store more than uniform, {:.1f} to {:.1f} and {:.1f} to {:.1f} times as much"
    assert told.format(*(f(x) for x in stored for f in (min, max))) in page


def changed(arm):
    """How many modules a decision puts on that were off, in the mean over an arm's final runs."""
    runs = the_study()[1][arm].values()
    histories = [[set(on) for _, on in line["decisions"]] for line in runs]
    return np.mean([len(b - a) for h in histories for a, b in itertools.pairwise(h)])


def compared(arm, other):
    """(mean, interval over seeds, interval over both, verdict) of two arms of ten seeds each."""
    _, arms, labels, _ = the_study()
    assert len(arms[arm]) == len(arms[other]) == 10
    _, mean, seeds, both = compare_report.compared(arms[arm], arms[other], labels)
    return mean, seeds, both, compare_report.verdict(seeds, both)


def test_what_is_told_of_the_later_arms_is_of_the_lines():
    """What changes at a decision, and the differences that no table has or that prose repeats."""
    _, arms, labels, page = the_study()
    slot, combined = "grad_norm_slot dynamic", "random dynamic combined"
    by_hand = arms["v_proj alone, r 4"]
    rest = {seed: line for seed, line in by_hand.items() if seed != 9}
    kept = compared(f"{slot}, off = frozen", slot)
    for text in (
        f"it exchanges {changed(slot):.1f} of its three modules at a decision. It is "
        f"{-compared(slot, 'uniform r 2')[0]:.1f} points below uniform",
        "({0:+.1f} beside it, {3})".format(*compared(slot, "random dynamic")),
        "stands at {0:+.1f} beside uniform ({3})".format(
            *compared("v_proj alone, r 4", "uniform r 2")
        ),
        f"(seed 9, {100 * by_hand[9]['test']['accuracy']:.1f} %) hardly learned; without it the "
        f"mean is {compare_report.compared(rest, arms['uniform r 2'], labels)[1]:.1f}",
        "stand at {0:+.1f} beside uniform ({3})".format(
            *compared("GRAD-NORM on single ranks", "uniform r 2")
        ),
        "is {:.1f} points lower ({:+.1f} … {:+.1f}, {:+.1f} … {:+.1f})".format(
            kept[0], *kept[1], *kept[2]
        ),
        "it is {0:+.1f} ({3}), which".format(*compared("GRAD-NORM dynamic combined", combined)),
        f"random exchanges {changed(combined):.1f} of its nine modules each time",
        "stands at {0:+.1f} beside r 2 ({3})".format(*compared("uniform r 8", "uniform r 2")),
    ):
        assert text in page


def test_what_is_told_of_off_frozen_with_grad_norm_is_of_the_lines():
    """On q and v it changes nothing; with shortcuts, beside uniform, chance and itself without."""
    _, arms, _, page = the_study()
    runs = [arms[f"GRAD-NORM dynamic{end}"] for end in ("", ", off = frozen")]
    assert all(runs[0][seed]["predictions"] == runs[1][seed]["predictions"] for seed in runs[0])
    assert "the same predictions in each of the ten seeds), 5.2 points below uniform" in page
    plain, chance, uniform = "GRAD-NORM dynamic combined", "random dynamic combined", "uniform r 2"
    frozen, kept = f"{plain}, off = frozen", f"{chance}, off = frozen"
    stored = [line["stored"] / 55296 for line in arms[frozen].values()]
    worst = min(line["test"]["accuracy"] for line in arms[frozen].values())
    gain, seeds, both, _ = compared(kept, chance)
    lost, _, _, verdict = compared(kept, f"{uniform} on all")
    for text in (
        "and stands at {0:+.1f} beside random with off = frozen ({3})".format(
            *compared("GRAD-NORM dynamic, off = frozen", "random dynamic, off = frozen")
        ),
        "With off = frozen the mean is {0:+.1f} beside uniform ({3})".format(
            *compared(frozen, f"{uniform} on all")
        ),
        f"the worst has {100 * worst:.1f} %; beside the same without it the mean is "
        "{0:+.1f} ({3})".format(*compared(frozen, plain)),
        f"It exchanges {changed(frozen):.1f} of its nine modules at a decision and stores "
        f"{min(stored):.1f} to {max(stored):.1f} times what it trains",
        "with off = frozen it is {0:+.1f} ({3}).".format(*compared(frozen, kept)),
        f"That one exchanges {changed(kept):.1f} of nine",
        f"is {gain:.1f} points above random without off = frozen "
        "({:+.1f} … {:+.1f}, {:+.1f} … {:+.1f})".format(*seeds, *both),
        f"and {-lost:.1f} below uniform ({verdict})",
    ):
        assert text in page


def test_runs_that_hardly_learned_are_those_of_the_lines():
    """Whose they are, how many each has, and at which rates there is none."""
    _, arms, _, page = the_study()
    low = {name: sum(x["test"]["accuracy"] < 0.7 for x in arms[name].values()) for name in arms}
    slow = [name for name in arms if arms[name][1]["lr"] == 0.001]
    assert not any(low[name] for name in slow)
    assert f"of the {10 * len(slow)} runs at 0.001 there is none" in page
    told = {
        "{} of the ten runs of random dynamic,": "random dynamic",
        "{} of grad_norm_slot dynamic,": "grad_norm_slot dynamic",
        "{} of random dynamic combined,": "random dynamic combined",
        "{} each of random static": "random static",
        "{} each of random static and of both arms": "random dynamic, off = frozen",
        "{} each of random static and of both": "grad_norm_slot dynamic, off = frozen",
        "{:.0s}one each of random on single ranks": "random on single ranks, dynamic",
        "{:.0s}ranks, GRAD-NORM combined and": "GRAD-NORM dynamic combined",
        "{:.0s}combined and `v_proj` alone. All": "v_proj alone, r 4",
    }
    assert {name for name in arms if low[name]} == {*told.values(), "head alone"}
    none([text for text, name in told.items() if text.format(str(low[name])) not in page])
    assert all(low[name] == 1 for text, name in told.items() if ":.0s" in text)


def test_what_is_told_without_some_runs_and_of_three_epochs_is_of_the_lines():
    _, arms, labels, page = the_study()
    without, four = "the mean is {0:+.1f}", "({1:+.1f} … {2:+.1f}, {3:+.1f} … {4:+.1f})"
    three = "{0:.1f} points above GRAD-NORM's three whole modules " + four[:-1]
    ranks, uniform = "GRAD-NORM on single ranks", "uniform r 2"
    for arm, seeds, control, text in (
        ("v_proj alone, r 4", [9], uniform, f"without it {without} {four}"),
        ("grad_norm_slot dynamic, off = frozen", [5, 9], uniform, f"both {without} {four}"),
        ("GRAD-NORM dynamic combined", [5], "uniform r 2 on all", f"without it {without}"),
        (ranks, [], "GRAD-NORM static", three),
    ):
        rest = {seed: x for seed, x in arms[arm].items() if seed not in seeds}
        _, mean, t, both = compare_report.compared(rest, arms[control], labels)
        assert text.format(mean, *t, *both) in page
    several = [sum(map(bool, x["decisions"][0][1].values())) for x in arms[ranks].values()]
    assert f"the 24 ranks lie in {min(several)} to {max(several)} modules" in page
    last = []
    for name in (uniform, "GRAD-NORM dynamic", "v_proj alone, r 4", "random static"):
        dev = [[epoch["accuracy"] for epoch in x["dev"][-2:]] for x in arms[name].values()]
        last.append(100 * np.diff(dev).mean())
    told = "by {:.1f} points for uniform, {:.1f} for GRAD-NORM, {:.1f} for `v_proj` alone, {:.1f}"
    assert told.format(*last) in page
    control = arms["uniform r 2, alpha 12"]
    assert -0.05 < compare_report.compared(control, arms[uniform], labels)[-1][0] < 0
    assert "leaves it open, by less than 0.05" in page


def test_every_rate_of_the_study_is_the_best_and_at_no_edge():
    """As the page says; by the means of the tune lines, not by the study's own rule."""
    lines, arms, _, page = the_study()
    assert "three or four rates between 3e-4 and 1e-2, the best one never at an edge" in page
    right = collections.defaultdict(lambda: collections.defaultdict(list))
    for x in lines:
        if x["phase"] == "tune":
            right[x["arm"]][x["lr"]].append(round(600 * x["dev"][-1]["accuracy"]))
    grid = [3e-4, 1e-3, 3e-3, 1e-2]
    for arm, found in arms.items():
        (rate,) = {x["lr"] for x in found.values()}
        tried = sorted(right[arm])
        assert tried in (grid, grid[:3], grid[1:]) and rate in tried[1:-1]
        assert all(len(hits) == 2 for hits in right[arm].values())
        best = sum(right[arm][rate])
        assert all(sum(right[arm][lr]) < best + (lr > rate) for lr in tried if lr != rate)


def test_what_is_told_of_single_ranks_is_of_the_lines():
    """What changes at a decision, where the free ranks are, and what is stored."""
    arms = compare_report.finals(compare_report.read_results(ROOT / "results" / "mrpc.jsonl"))
    changed, late, stored = {}, {}, {}
    for name in ("GRAD-NORM", "random"):
        lines = list(arms[f"{name} on single ranks, dynamic"].values())
        histories = [[on for _, on in line["decisions"]] for line in lines]
        sets = [[{(m, k) for m in on for k in on[m]} for on in history] for history in histories]
        assert len(sets) == 10 and all(len(s) == 24 for of_run in sets for s in of_run)
        changed[name] = np.mean([len(b - a) for s in sets for a, b in itertools.pairwise(s)])
        places = [f"layers.{i}.v_proj" for i in (3, 4, 5)]
        free = [[sum(len(on[p]) - 1 for p in places) for on in history] for history in histories]
        late[name] = np.mean([f[0] for f in free]), np.mean([f[-1] for f in free])
        stored[name] = [line["stored"] / 18432 for line in lines]
    (first, last), few, many = late["GRAD-NORM"], min(stored["GRAD-NORM"]), max(stored["GRAD-NORM"])
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    for text in (
        f"At first all {first:g} free ranks are in `v_proj` of the last three blocks, at the end "
        f"{last:.0f} of them",
        {1: "about one rank goes and one comes"}[round(changed["GRAD-NORM"])],
        f"{few:.1f} to {many:.1f} times as many parameters are stored",
        f"the random one exchanges {changed['random']:.0f} of 24 ranks each time",
    ):
        assert text in page


def test_the_tables_of_the_scores_are_what_the_lines_say():
    file = ROOT / "results" / "ablation.jsonl"
    blocks = "\n".join(ablation.tables(ablation.parse(file.read_bytes(), file))).split("\n\n")
    tables = [block for block in blocks if block.startswith(("| Spearman", "| overlap"))]
    assert len(tables) == 2
    text = (ROOT / "docs" / "results.md").read_text()
    none([table for table in tables if f"\n\n{table}\n\n" not in text])


def test_the_results_of_the_readme_are_those_of_the_page():
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    section = (ROOT / "README.md").read_text().partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("|")]
    assert rows
    none([row for row in rows if row not in page])


def test_versions_are_those_of_the_requirements():
    pins = {}
    for file in (ROOT / "requirements.txt", ROOT / "tests" / "peers" / "requirements.txt"):
        for line in file.read_text().split():
            package, _, version = line.partition("==")
            pins[package.lower()] = version
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]
    pins["python"] = f"{python[2]}.{python[3:]}"
    wrong = []
    for where, text in texts():
        pattern = rf"\b({'|'.join(pins)})(?:==| )(\d+\.\d+(?:\.\d+)*)"
        for package, version in re.findall(pattern, text, re.I):
            pin = pins[package.lower()]
            if pin != version and not pin.startswith(version + "."):
                wrong.append(f"{where}: {package} {version}, required is {pin}")
    none(wrong)


# ----------------------------------------------------------------------------------- size and shape


def test_size_guides():
    root = {p.name: len(lines_of_code(p)) for p in MODULES}
    assert sorted(root) == sorted(
        ["model.py", "lora.py", "proxies.py", "allocate.py", "delta_lora.py", "train.py"]
    )
    too_long = {n: size for n, size in root.items() if size > GUIDES.get(n, GUIDE)}
    relatives = {p.name: len(lines_of_code(p)) for p in (ROOT / "relatives").glob("*.py")}
    too_long |= {n: s for n, s in relatives.items() if s > GUIDES.get(n, RELATIVE)}
    none([f"{name} has {size} lines of code" for name, size in too_long.items()])
    assert sum(root.values()) <= TOGETHER


def test_no_function_is_longer_than_a_screen():
    wrong = []
    for path in CODE:
        for node in with_docstrings(path):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION:
                size = len(lines_of_code(path) & set(range(node.lineno, node.end_lineno + 1)))
                if size > FUNCTION:
                    wrong.append(f"{relative(path)}: {node.name} has {size} lines of code")
    none(wrong)


def broken(text):
    """The lines of a docstring after which something was broken off, counted from 0.

    A line of prose that ends early though the next word, in lower case, would have fitted; or a
    row of an aligned table that goes on below its table.
    """
    lines = text.splitlines()
    for i, (line, after) in enumerate(itertools.pairwise(lines)):
        here, there = line.strip(), after.strip()
        if not here or not there:
            continue
        table = i and "|" in line and lines[i - 1].find("|") == line.find("|")
        if table and "|" not in there and after.find(there) < line.rfind("|"):
            yield i
        prose = not any(re.search(r" {2,}|\||->|=|[∑Σ]", part) for part in (here, there))
        fits = len(line) + 1 + len(there.split()[0]) <= 70
        same = i == 0 or len(line) - len(line.lstrip()) == len(after) - len(after.lstrip())
        if (
            prose
            and fits
            and same
            and re.match(r"[a-z(]", there)
            and not re.search(r"[.:;,]$", here)
        ):
            yield i


def test_no_docstring_is_broken_in_mid_phrase():
    wrong = []
    for path in CODE:
        for number, text in docstring_lines(path):
            wrong += [f"{relative(path)}:{number + i}" for i in broken(text)]
    none(wrong)


def test_a_broken_docstring_is_seen():
    table = (
        "Summary.\n\n    name  | shape\n    x     | (b, t, d)  the stream, d =\n    hidden_size\n"
    )
    assert list(broken(table)) == [3]
    prose = "Summary.\n\nSome words that were cut off here\nlike this by a tool.\n"
    assert list(broken(prose)) == [2]
    assert not list(broken("Summary.\n\n" + "whole " * 14 + "sentence that\ngoes on below.\n"))


def test_every_file_has_a_head():
    """A summary on the first line; only an empty __init__.py has none."""
    wrong = []
    for path in CODE:
        first, *rest = head(path).splitlines() or [""]
        whole = first.rstrip().endswith((".", ")")) or re.search(r": \S|[.?]", first)
        if path.read_text().strip() and not (whole and (not rest or not rest[0].strip())):
            wrong.append(f"{relative(path)}: {first}")
    none(wrong)


# ---------------------------------------------------------------------------- equations, deviations


def rows(path):
    """Cells of the rows of a page's tables, bars unescaped, without heads and rules."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not set(line) <= set("|-: ") and not (after and set(after) <= set("|-: ")):
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            yield [cell.strip().replace("\\|", "|") for cell in cells]


def test_every_formula_stands_in_the_function_that_is_named():
    """Rows of docs/equations.md: what it is, `file.py` `function`, `comment`, test."""
    found = list(rows(ROOT / "docs" / "equations.md"))
    assert len(found) > 25
    for _, where, comment, test in found:
        file, function = re.fullmatch(r"`([\w/]+\.py)` `([\w.]+)`", where).groups()
        (path,) = files_called(file)
        node = tree(path)
        for name in function.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == name)
        text = path.read_text().splitlines()
        at = [i for i, line in enumerate(text, 1) if comment.strip("`") in line]
        assert len(at) == 1, f"{comment} stands {len(at)} times in {file}"
        assert node.lineno <= at[0] <= node.end_lineno, f"{comment} is not in {function}"
        assert re.fullmatch(r"`test_\w+\.py::\w+`(, `test_\w+\.py::\w+`)*", test), test


def test_deviations_are_numbered_and_say_where_and_what_notices():
    text = (ROOT / "docs" / "deviations.md").read_text()
    items = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## |\Z)", text, re.M | re.S)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    for number, item in items:
        assert re.search(r"`[\w/]+\.py`\s+`[\w.]+`", item), f"{number} names no line"
        assert re.search(r"`\w+\.py::\w+`", item), f"{number} names no test"
