"""Compare a candidate with the cases, and say of a wrong answer what the mistake most likely is.

An error is the largest difference over the largest absolute value, tensor by tensor (a list of
numbers is a tensor); the largest of a case is printed. Where several answers are right, what they
have in common is compared: a set of names by its rules, a pair of factors by its product.

THE CAUSE. Each known mistake (causes.py) that gives the same wrong answer could be it. Of those,
the ones are named that fit the function's other cases too: right where the candidate is right,
and wrong in the same way where it is wrong.

What this file does not do: choose inputs (cases.py), read or write them (golden.py), print.
"""

import dataclasses
import importlib.util
import inspect
import math
import sys
import textwrap
import traceback
from pathlib import Path

import numpy as np
import torch

from support.errors import one_line
from tools.oracle import causes, golden, ours, ours_adapters, ours_rules
from tools.oracle.cases import PROXY_TEXTS

ROUNDING = 1e-5  # an error that float32 alone can make
NOT_OFFERED = "not offered"
KINDS_OF_SETS = (set, frozenset, list, tuple, dict)  # of names, whatever the order


@dataclasses.dataclass
class Row:
    """One case in one precision; outcome is what the candidate returned, or the exception."""

    content: dict
    tensors: dict
    dtype: str
    outcome: object = None
    error: float = math.nan
    verdict: str = "-"  # pass, FAIL or -
    reason: str = NOT_OFFERED

    def __post_init__(self):
        self.function = self.content["function"]
        self.tolerance = self.content["tolerance"][self.dtype]
        self.known = None

    def arguments(self):
        """Fresh copies: a candidate may change them."""
        return golden.restore(self.content["arguments"], self.tensors, golden.DTYPES[self.dtype])

    def mistakes(self):
        """{cause: what it returns or raises, once it is called}."""
        if self.known is None:
            self.known = dict(getattr(causes, self.function)(**self.arguments()))
        return self.known

    def shows(self, cause):
        """Whether the candidate does here what this mistake does; None: not known here."""
        if cause not in self.mistakes():
            return None
        wrong = self.mistakes()[cause]
        if callable(wrong):  # made once, then kept
            wrong = self.known[cause] = attempt(wrong)
        return alike(self, wrong)


# ---------------------------------------------------------------------------------------- comparing


def plain(value):
    """Tensors, also in a list, without a gradient and on the CPU; an array as a list."""
    if torch.is_tensor(value):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def numbers(value):
    return isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)


def error_of(got, expected, where="", enough=math.inf):
    """The largest relative error between nested results.

    Args:
        enough: float; once an error is larger, the rest is not looked at.

    Returns:
        (error, reason); inf and a reason where they differ in kind, else "".
    """
    if numbers(expected) and expected:
        expected = torch.tensor(expected, dtype=torch.float64)
    if torch.is_tensor(expected) or isinstance(expected, (int, float)):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        try:
            got = plain(got)
            if torch.is_tensor(got) and got.is_complex():
                return math.inf, f"{where or 'result'}: complex, not real"
            got = torch.as_tensor(got, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return math.inf, f"{where or 'result'}: {type(got).__name__}, no number or tensor"
        if got.shape != expected.shape:
            shapes = f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
            return math.inf, f"{where or 'result'}: {shapes}"
        if not got.isfinite().all():
            return math.inf, f"{where or 'result'}: not finite"
        largest = expected.abs().max().item() or 1.0
        return (got - expected).abs().max().item() / largest, ""
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return math.inf, f"{where or 'result'}: {type(got).__name__}, not a dict"
        if got.keys() != expected.keys():
            first = sorted(map(str, got.keys() ^ expected.keys()))[0]
            return math.inf, f"{where or 'result'}: other keys, {first} is in one of the two alone"
        if expected and all(isinstance(v, (int, float)) for v in expected.values()):
            return error_of([got[k] for k in expected], list(expected.values()), where)
        pairs = [(k, got[k], v) for k, v in expected.items()]
    elif isinstance(expected, list) and isinstance(got, (list, tuple, np.ndarray)):
        if len(got) != len(expected):
            return math.inf, f"{where or 'result'}: {len(got)} items, not {len(expected)}"
        pairs = zip(range(len(got)), got, expected, strict=True)
    else:
        same = got == expected
        return (0.0, "") if same else (math.inf, f"{where or 'result'}: {got!r}, not {expected!r}")
    worst = (0.0, "")
    for key, part, right in pairs:
        worst = max(worst, error_of(part, right, f"{where}/{key}", enough), key=lambda w: w[0])
        if worst[0] > enough:
            break
    return worst


def choice_error(function, arguments, got, expected):
    """(0 or inf, reason) for a set of names."""
    scores = arguments["scores"]
    if not isinstance(got, KINDS_OF_SETS):
        return math.inf, f"result: {type(got).__name__}, not a set of names"
    try:
        got = set(got)
    except TypeError as error:  # of lists
        return math.inf, f"result: {one_line(error)}, not a set of names"
    if "error" in expected:
        return math.inf, f"{len(got)} modules, where a ValueError belongs"
    unknown = got - set(scores)
    if unknown:
        return math.inf, f"unknown module {min(unknown, key=str)}"
    if function == "within_budget":
        spent = sum(arguments["costs"][n] for n in got)
        value, best = sum(scores[n] for n in got), expected["sum of scores"]
        if spent > arguments["budget"]:
            return math.inf, f"{spent} parameters, the budget is {arguments['budget']}"
        return abs(value - best) / best, f"sum of scores {value:g}, possible {best:g}"
    if len(got) != expected["count"]:
        return math.inf, f"{len(got)} on, not {expected['count']}"
    wrong = set(expected["must"]) - got or got - set(expected["must"]) - set(expected["may"])
    return (math.inf, f"{sorted(wrong)[0]} is wrong") if wrong else (0.0, "")


def product(pair):
    """{"lora_A", "lora_B"} -> (their product, number of ranks). ValueError: no such pair."""
    try:
        return pair["lora_B"] @ pair["lora_A"], len(pair["lora_A"])
    except (TypeError, KeyError, RuntimeError, IndexError) as error:
        raise ValueError("result: no dict with lora_A (R, in) and lora_B (out, R)") from error


def result_error(function, arguments, got, expected):
    """(error, reason) of what a candidate returned."""
    if function in golden.CHOICES:
        return choice_error(function, arguments, got, expected)
    if function == "delta_adapter":
        try:
            matrix, ranks = product(got)
        except ValueError as error:
            return math.inf, str(error)
        if ranks > expected["largest rank"]:
            return math.inf, f"R is {ranks}, 2r is {expected['largest rank']}"
        return error_of(matrix, expected["product"])
    return error_of(got, expected)


def alike(row, wrong):
    """Whether the candidate's outcome and a wrong one, results or exceptions, are the same."""
    return attempt(same_outcome, row, row.outcome, wrong) is True


def same_outcome(row, got, wrong):
    """As alike, of an outcome that can be compared; else it may raise anything."""
    if isinstance(got, Exception) or isinstance(wrong, Exception):
        return of_shapes(got) and of_shapes(wrong)
    if row.function in golden.CHOICES:  # names of equal score and cost are exchangeable
        if not isinstance(got, KINDS_OF_SETS):
            return False
        scores, costs = (
            row.content["arguments"]["scores"],
            row.content["arguments"].get("costs", {}),
        )
        worth = [
            sorted((scores[n], costs.get(n)) for n in names if n in scores)
            for names in (got, wrong)
        ]
        return worth[0] == worth[1] and len(got) == len(wrong)
    if row.function == "delta_adapter":
        try:
            (matrix, ranks), (other, other_ranks) = product(got), product(wrong)
        except ValueError:
            return False
        large = row.content["expected"]["largest rank"]
        same = error_of(matrix, other)[0] <= row.tolerance
        return same and (ranks > large) == (other_ranks > large)
    return error_of(got, wrong, enough=row.tolerance)[0] <= row.tolerance


def of_shapes(outcome):
    """Whether this is what torch or numpy raise for shapes that do not fit."""
    words = ("shape", "size of tensor", "broadcast", "mismatch", "dimension")
    kind = isinstance(outcome, (RuntimeError, ValueError))
    return kind and any(word in str(outcome) for word in words)


# ------------------------------------------------------------------------------------------ judging


def attempt(call, *args, **kwargs):
    """What it returns, or the exception that it raises: somebody else's code may do anything."""
    try:
        return call(*args, **kwargs)
    except SystemExit as error:
        return RuntimeError(f"it ends the program: exit({error.code!r})")
    except Exception as error:
        return error


def judge(candidate, content, tensors, dtype):
    """The Row of one case in one precision, without a likely cause."""
    row = Row(content, tensors, dtype)
    function = getattr(candidate, row.function, None)
    if function is None:
        return row
    expected = golden.restore(content["expected"], tensors)
    row.outcome = attempt(function, **row.arguments())
    if isinstance(row.outcome, NotImplementedError):
        return row
    wants_error = isinstance(expected, dict) and expected.keys() == {"error"}
    if isinstance(row.outcome, Exception):
        right = wants_error and isinstance(row.outcome, ValueError)
        row.error, row.reason = (0.0, "") if right else (math.inf, told(row.outcome, candidate))
    else:
        arguments = row.arguments()
        judged = attempt(result_error, row.function, arguments, row.outcome, expected)
        if isinstance(judged, Exception):  # of a result as nobody expects it
            judged = (math.inf, f"a result that cannot be compared: {one_line(judged)}")
        row.error, row.reason = judged
    row.verdict = "pass" if row.error <= row.tolerance else "FAIL"
    if row.verdict == "pass":
        row.reason = ""
    return row


def told(error, candidate):
    """An exception in one line, with the candidate's line that it came from."""
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    path = getattr(candidate, "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f"{text} (line {lines[-1]} of {Path(path).name})" if lines else text


def likely_causes(row, rows):
    """The known mistakes that this row shows, those alone that fit most of the function's rows.

    That shapes do not fit says little: there, a mistake has to fit all rows.
    """
    found = [cause for cause in list(row.mistakes()) if row.shows(cause)]
    raised = isinstance(row.outcome, Exception)
    if len(found) > 1 or raised:
        others = [r for r in rows if r is not row]
        against = {c: sum(other.shows(c) is False for other in others) for c in found}
        least = 0 if raised else min(against.values())
        found = [cause for cause in found if against[cause] == least]
    return found


def diagnose(rows):
    """Put the likely cause into the reason of each failure among rows of one function."""
    offered = [row for row in rows if row.verdict != "-"]
    for row in offered:
        if row.verdict != "FAIL" or row.content["expected"] == {"error": "ValueError"}:
            continue
        same = [r for r in offered if r.dtype == row.dtype]
        twin = next((r for r in offered if r.content is row.content and r is not row), row)
        if row.dtype == "float32" and twin.reason.startswith("likely: "):
            row.reason = twin.reason  # the same mistake, told from more digits
            continue
        found = likely_causes(row, same)
        if found:
            raised = f" ({row.reason})" if isinstance(row.outcome, Exception) else ""
            row.reason = f"likely: {', or '.join(found[:3])}{raised}"
        elif not row.reason and row.dtype == "float64" and row.error < ROUNDING:
            row.reason = "no known cause, but as small as the rounding of float32"
        else:
            row.reason = row.reason or "no known cause"


def check(folder, candidate, only=None):
    """Judge a candidate.

    Args:
        folder: of cases. candidate: module. only: the name of a function or of a case, or None.

    Returns:
        [Row] in the order of the files.

    Raises:
        ValueError, OSError: as golden.read.
    """
    cases = golden.read(folder, only)
    rows = [judge(candidate, *case, dtype) for case in cases for dtype in case[0]["dtypes"]]
    by_function = {}
    for row in rows:
        by_function.setdefault(row.function, []).append(row)
    for group in by_function.values():
        diagnose(group)
    return rows


def table(rows):
    """The lines to print: one a row, and the sum."""
    lines = [f"{'case':<38} {'dtype':<8} {'error':>8} {'allowed':>8}  verdict"]
    for row in rows:
        error = "-" if math.isnan(row.error) else f"{row.error:.1e}"
        line = f"{row.content['name']:<38} {row.dtype:<8} {error:>8} {row.tolerance:>8.0e}"
        line += f"  {row.verdict}  {row.reason}"
        lines.append(line.rstrip())
    count = {v: sum(row.verdict == v for row in rows) for v in ("pass", "FAIL", "-")}
    lines.append(f"{count['pass']} pass, {count['FAIL']} fail, {count['-']} not offered")
    return lines


# ----------------------------------------------------------------------------- candidate, interface


def load_candidate(path):
    """A Python file as a module. ValueError where it cannot be imported."""
    spec = importlib.util.spec_from_file_location("candidate", path)
    if spec is None or not Path(path).is_file():
        raise ValueError(f"the candidate {path} is no Python file")
    module, folder = importlib.util.module_from_spec(spec), str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # as a dataclass in it expects
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody else's file does
        raise ValueError(f"the candidate {path} cannot be imported: {error!r}") from error
    finally:
        sys.path.remove(folder)
    sys.path.append(folder)  # for what its functions import; last, so that it hides nothing
    return module


def interface_functions():
    """{name: function} a candidate may define: those that have mistakes in causes.py."""
    found = {}
    for module in (ours, ours_adapters, ours_rules):
        own = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
        found |= {n: f for n, f in own.items() if f.__module__ == module.__name__}
    return {n: f for n, f in found.items() if hasattr(causes, n)}


def interface():
    """The interface as text: what every function is given and returns."""
    introduction = inspect.getdoc(ours).rpartition("\n\n")[0]  # without what the file does not do
    parts = [introduction]
    for name, function in interface_functions().items():
        text = inspect.getdoc(function).replace("\n", "\n    ")
        signature = f"{name}{inspect.signature(function)}"
        signature = textwrap.fill(signature, 100, subsequent_indent=" " * (len(name) + 1))
        parts.append(f"{signature}\n    {text}")
    formulas = "The proxies of scores; o is entry by entry, H the Hessian, theta all of A and B:"
    for name, formula in PROXY_TEXTS.items():
        text = textwrap.fill(formula, 76, initial_indent=" " * 24, subsequent_indent=" " * 24)
        formulas += f"\n    {name:<20}{text[24:]}"
    return "\n\n".join([*parts, formulas]).replace("\n    \n", "\n\n")
