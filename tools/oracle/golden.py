"""The cases on disk: NAME.json says what is checked, NAME.safetensors holds the tensors.

    name, what, reference    the case in words and symbols
    function, arguments      what a candidate is called with; {"tensor": KEY} stands for a tensor
    expected                 what a right candidate returns
    dtypes, tolerance        in which precisions, and the largest error allowed in each

The same export gives the same bytes.

What this file does not do: choose the cases (cases.py, cases_relatives.py), compare (check.py).
"""

import copy
import inspect
import json
import math
from pathlib import Path

import safetensors.torch
import torch

from support import hf_folder
from support.form import finite, misfit
from tools.oracle import cases, cases_relatives, causes, ours

CHOICES = ("keep_top", "within_budget", "adalora_keep")  # functions that return a set of names
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def name_of_a_dtype(value):
    return value in tuple(DTYPES)


def function_of_the_interface(value):
    """The name of one: it has its answer in ours.py, and its mistakes in causes.py."""
    found = [getattr(module, str(value), None) for module in (ours, causes)]
    return all(map(inspect.isfunction, found))


def anything(value):
    return True


FORM = {
    "name": str,
    "function": function_of_the_interface,
    "what": str,
    "reference": str,
    "dtypes": [name_of_a_dtype],
    "tolerance": {str: finite},
    "arguments": {str: anything},
    "expected": anything,
}


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
    """The inverse of flatten; floating-point tensors in dtype, all of them copies."""
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        tensor = tensors[value["tensor"]].clone()
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    if isinstance(value, dict):
        return {k: restore(v, tensors, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [restore(v, tensors, dtype) for v in value]
    return value


def expectation(case):
    """What a right candidate returns; where several answers are right, what they have in common."""
    arguments = copy.deepcopy(case.arguments)
    try:
        found = getattr(ours, case.function)(**arguments)
    except ValueError:
        return {"error": "ValueError"}
    if case.function == "delta_adapter":
        largest_rank = 2 * arguments["lora_A"].shape[1]
        return {"product": found["lora_B"] @ found["lora_A"], "largest rank": largest_rank}
    if case.function == "within_budget":
        return {"sum of scores": math.fsum(arguments["scores"][n] for n in found)}
    if case.function in ("keep_top", "adalora_keep"):
        scores = arguments["scores"]
        cut = min(scores[n] for n in found)
        if not arguments.get("together", True):
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
        for case in (every := [*cases.all_cases(), *cases_relatives.all_cases()]):
            tensors = {}
            arguments = flatten(case.arguments, "arguments", tensors)
            content = {
                "name": case.name,
                "function": case.function,
                "what": case.about,
                "reference": case.reference,
                "dtypes": list(DTYPES if tensors else ["float64"]),
                "tolerance": case.tolerance,
                "arguments": arguments,
                "expected": flatten(expectation(case), "expected", tensors),
            }
            path = folder / f"{case.name}.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
            if tensors:
                stored = safetensors.torch.save({k: tensors[k] for k in sorted(tensors)})
                path.with_suffix(".safetensors").write_bytes(stored)
    finally:
        torch.set_num_threads(threads)
    return len(every)


def read(folder, only=None):
    """[(content of NAME.json, its tensors)] of all cases, or of those of one name or function.

    Raises:
        ValueError, OSError: no cases, a file that is none, or nothing of the name `only`.
    """
    folder, cases, functions = Path(folder), [], {}
    for path in sorted(folder.glob("*.json")):
        content = hf_folder.read_json(path)
        wrong = misfit(content, FORM)
        if wrong or set(content["dtypes"]) - set(content["tolerance"]):
            why = wrong or "a dtype without a tolerance"
            raise ValueError(f"{path} is not a case of the oracle: {why}")
        functions[content["function"]] = True
        if only not in (None, content["name"], content["function"]):
            continue
        stored = path.with_suffix(".safetensors")
        needs = '"tensor"' in path.read_text()
        tensors = hf_folder.read_file(stored) if needs else {}
        try:
            restore([content["arguments"], content["expected"]], tensors)
        except KeyError as error:
            raise ValueError(f"{stored} lacks the tensor {error}") from error
        cases.append((content, tensors))
    if not functions:
        raise FileNotFoundError(f"{folder} holds no cases: python -m tools.oracle export {folder}")
    if not cases:
        raise ValueError(f"{only} is no case and no function, allowed: {', '.join(functions)}")
    return cases
