"""Golden vectors for other implementations: python tools/oracle.py export|check DIR

    export   writes every case: NAME.json says what is checked, NAME.safetensors holds the tensors
    check    (with --candidate FILE) calls the functions of a candidate with the stored inputs, in
             float64 and float32, and prints case, error, tolerance, verdict and, for a failure, the
             likely cause

The interface, any subset of it, is ours.py: lora_forward, lora_backward, merge, logits,
scores, rank_scores, keep_top, within_budget, delta_lora, train. An error is the largest
difference over the largest absolute value of a tensor (or list of numbers). The files are in
tests/golden/; the same export gives the same bytes.

What this file does not do: choose inputs (oracle_cases.py), know mistakes (causes.py).
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import safetensors.torch
import torch

from support import hf_folder, run_folder
from tools.oracle import causes, ours
from tools.oracle.cases import all_cases

ALLOCATIONS = ("keep_top", "within_budget")
FIELDS = ("name", "function", "what", "dtypes", "tolerance", "arguments", "expected")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


# ------------------------------------------------------------------------------------------ storing


def flatten(value, key, tensors):
    """Nested dicts and lists with tensors -> the same with {"tensor": key}, tensors put aside."""
    if torch.is_tensor(value):
        tensors[key] = value.contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {k: flatten(v, f"{key}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]
    return value


def restore(value, tensors, dtype=None):
    """The inverse of flatten; floating-point tensors in dtype."""
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        tensor = tensors[value["tensor"]]
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor.clone()
    if isinstance(value, dict):
        return {k: restore(v, tensors, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [restore(v, tensors, dtype) for v in value]
    return value


def expectation(case):
    """What a right candidate returns; for an allocation, what a right choice must satisfy."""
    arguments = copy.deepcopy(case.arguments)
    try:
        found = getattr(ours, case.function)(**arguments)
    except ValueError:
        return {"error": "ValueError"}
    if case.function == "within_budget":
        return {"sum of scores": math.fsum(arguments["scores"][n] for n in found)}
    if case.function == "keep_top":
        scores = arguments["scores"]
        cut = min(scores[n] for n in found)
        if not arguments["together"]:
            return {"must": sorted(found), "may": [], "count": len(found)}
        must, may = ([n for n in scores if f(scores[n])] for f in (cut.__lt__, cut.__eq__))
        return {"must": sorted(must), "may": sorted(may), "count": len(found)}
    return found


def export(folder):
    """Write all cases; returns their number."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    try:
        for case in (cases := all_cases()):
            tensors = {}
            content = {
                "name": case.name,
                "function": case.function,
                "what": case.about,
                "reference": case.reference,
                "dtypes": list(DTYPES if case.function not in ALLOCATIONS else ["float64"]),
                "tolerance": case.tolerance,
                "arguments": flatten(case.arguments, "arguments", tensors),
                "expected": flatten(expectation(case), "expected", tensors),
            }
            text = json.dumps(content, indent=1) + "\n"
            run_folder.write_atomic(folder / f"{case.name}.json", text.encode())
            if tensors:
                stored = safetensors.torch.save({k: tensors[k] for k in sorted(tensors)})
                run_folder.write_atomic(folder / f"{case.name}.safetensors", stored)
    finally:
        torch.set_num_threads(threads)
    return len(cases)


def read(folder):
    """[(content of NAME.json, its tensors)] of all cases. ValueError, OSError: none, or broken."""
    folder, cases = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        content = hf_folder.read_json(path)
        absent = [field for field in FIELDS if field not in content]
        if absent or content["function"] not in vars(causes):
            raise ValueError(f"{path} is not a case of the oracle")
        stored = path.with_suffix(".safetensors")
        needs = '"tensor"' in path.read_text()
        cases.append((content, hf_folder.read_file(stored) if needs else {}))
    if not cases:
        raise FileNotFoundError(f"{folder} holds no cases: python tools/oracle.py export {folder}")
    return cases


# ---------------------------------------------------------------------------------------- comparing


def numbers(value):
    return isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)


def error_of(got, expected, where=""):
    """The largest relative error between nested results; inf with a reason where they differ in
    kind.

    Returns:
        (error, reason or "").
    """
    if numbers(expected) and expected:
        expected = torch.tensor(expected, dtype=torch.float64)
    if torch.is_tensor(expected) or isinstance(expected, (int, float)):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        try:
            got = torch.as_tensor(got, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):
            return math.inf, f"{where}: no number or tensor"
        if got.shape != expected.shape:
            return math.inf, f"{where}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        if not got.isfinite().all():
            return math.inf, f"{where}: not finite"
        largest = expected.abs().max().item() or 1.0
        return (got - expected).abs().max().item() / largest, ""
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return math.inf, f"{where}: other keys"
        if expected and all(isinstance(v, (int, float)) for v in expected.values()):
            return error_of([got[k] for k in expected], list(expected.values()), where)
        parts = [error_of(got[k], v, f"{where}/{k}") for k, v in expected.items()]
    elif isinstance(expected, list) and isinstance(got, (list, tuple)):
        if len(got) != len(expected):
            return math.inf, f"{where}: {len(got)} items, not {len(expected)}"
        parts = [error_of(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(got, expected))]  # noqa: B905
    else:
        return (0.0, "") if got == expected else (math.inf, f"{where}: {got!r}, not {expected!r}")
    return max(parts, key=lambda part: part[0], default=(0.0, ""))


def allocation_error(function, arguments, got, expected):
    """(0 or inf, reason) for a set of names."""
    got = set(got)
    if "error" in expected:
        return math.inf, f"{len(got)} modules, where a ValueError belongs"
    unknown = got - set(arguments["scores"])
    if unknown:
        return math.inf, f"unknown module {sorted(unknown)[0]}"
    if function == "within_budget":
        spent = sum(arguments["costs"][n] for n in got)
        value = sum(arguments["scores"][n] for n in got)
        best = expected["sum of scores"]
        if spent > arguments["budget"]:
            return math.inf, f"{spent} parameters, the budget is {arguments['budget']}"
        return abs(value - best) / best, f"sum of scores {value:g}, possible {best:g}"
    if len(got) != expected["count"]:
        return math.inf, f"{len(got)} on, not {expected['count']}"
    wrong = set(expected["must"]) - got or got - set(expected["must"]) - set(expected["may"])
    return (math.inf, f"{sorted(wrong)[0]} is wrong") if wrong else (0.0, "")


def likely_cause(function, mistakes, got, tolerance):
    """The first of the mistakes, (cause, wrong result), that gives this output, or ""."""
    for cause, wrong in mistakes:
        if function in ALLOCATIONS:
            if set(got) == wrong:
                return cause
        elif error_of(got, wrong)[0] <= tolerance:
            return cause
    return ""


def judge(candidate, content, tensors, dtype):
    """(error, tolerance, verdict, reason) of one case in one dtype; verdict: pass, FAIL or -."""
    function = getattr(candidate, content["function"], None)
    tolerance = content["tolerance"][dtype]
    if function is None:
        return math.nan, tolerance, "-", "not offered"
    arguments = restore(content["arguments"], tensors, DTYPES[dtype])
    expected = restore(content["expected"], tensors)
    wants_error = isinstance(expected, dict) and expected.keys() == {"error"}
    try:
        got = function(**copy.deepcopy(arguments))
        if content["function"] in ALLOCATIONS:
            error, reason = allocation_error(content["function"], arguments, got, expected)
        else:
            error, reason = error_of(got, expected)
    except NotImplementedError:
        return math.nan, tolerance, "-", "not offered"
    except Exception as raised:  # whatever somebody else's code does
        if wants_error and isinstance(raised, ValueError):
            return 0.0, tolerance, "pass", ""
        return math.inf, tolerance, "FAIL", f"{type(raised).__name__}: {raised}".split("\n")[0]
    if error <= tolerance:
        return error, tolerance, "pass", ""
    mistakes = getattr(causes, content["function"])(**copy.deepcopy(arguments))
    cause = likely_cause(content["function"], mistakes, got, tolerance)
    reason = f"likely: {cause}" if cause else reason or "no known cause"
    return error, tolerance, "FAIL", reason


def check(folder, candidate):
    """(lines of the table, number of failures, number of passes)."""
    lines = [f"{'case':<38} {'dtype':<8} {'error':>8} {'allowed':>8}  verdict"]
    count = {"pass": 0, "FAIL": 0, "-": 0}
    for content, tensors in read(folder):
        for dtype in content["dtypes"]:
            error, tolerance, verdict, reason = judge(candidate, content, tensors, dtype)
            count[verdict] += 1
            row = f"{content['name']:<38} {dtype:<8} {error:>8.1e} {tolerance:>8.0e}  {verdict}"
            lines.append(f"{row}  {reason}".rstrip())
    lines.append(f"{count['pass']} pass, {count['FAIL']} fail, {count['-']} not offered")
    return lines, count["FAIL"], count["pass"]


def load_candidate(path):
    """A Python file as a module. ValueError where it cannot be imported."""
    spec = importlib.util.spec_from_file_location("candidate", path)
    if spec is None or not Path(path).is_file():
        raise ValueError(f"the candidate {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's file does
        raise ValueError(f"the candidate {path} cannot be imported: {error!r}") from error
    finally:
        sys.path.pop(0)
    return module


def main(argv=None):
    """Exit code: 0 all that is offered passes; 1 something fails, or nothing is offered; 2 bad
    input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write all cases")
    out.add_argument("folder", type=Path)
    into = commands.add_parser("check", help="compare a candidate with the cases")
    into.add_argument("folder", type=Path)
    into.add_argument("--candidate", required=True, help="Python file, see ours.py")
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            print(f"{export(args.folder)} cases in {args.folder}")
            return 0
        lines, failures, passes = check(args.folder, load_candidate(args.candidate))
    except (ValueError, OSError) as error:
        print(f"oracle.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 1 if failures or not passes else 0


if __name__ == "__main__":
    sys.exit(main())
