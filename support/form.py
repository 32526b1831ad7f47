"""Whether what was read from a file has the form that it must have, before anything is made of it.

    a form                    | what fits
    None                      | None
    a type                    | a value of exactly that type: true is no int
    a function                | what it accepts; its name says what was expected
    {"key": form, …}, {}      | a dict with these keys, all of them and no others
    {type: form}              | a dict of any keys of that type
    [form]                    | a list
    (form, form, …)           | a tuple, member by member

What this file does not do: read files (run_folder.py, checkpoint.py), convert what does not fit.
"""

import sys

from support.errors import shown


class Maybe:
    """A form that None fits too."""

    def __init__(self, form):
        self.form = form


def count(value):
    """A form: an int from 0 to 2**63 - 1, of steps, lines or examples."""
    return type(value) is int and 0 <= value < 2**63


def finite(value):
    """An int or float that is neither infinite nor NaN, nor an int that no float holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def misfit(value, form, where="the content"):
    """What does not fit, in words, or "" where all does.

    Args:
        value: what was read.
        form: as in the table above.
        where: what the value is called in the words.
    """
    if isinstance(form, Maybe):
        return "" if value is None else misfit(value, form.form, where)
    if callable(form):
        fits = type(value) is form if isinstance(form, type) else form(value)
        return "" if fits else unlike(value, form.__name__.replace("_", " "), where)
    if type(value) is not type(form):
        return unlike(value, type(form).__name__, where)
    if form is None:
        return ""
    if isinstance(form, list):
        members = [(v, form[0], f"{where}[{i}]") for i, v in enumerate(value)]
    elif isinstance(form, tuple):
        if len(value) != len(form):
            return f"{where} has {len(value)} members, expected {len(form)}"
        members = [
            (v, f, f"{where}[{i}]") for i, (v, f) in enumerate(zip(value, form, strict=True))
        ]
    elif form and isinstance(next(iter(form)), type):
        [(key, content)] = form.items()
        members = [(k, key, f"a key of {where}") for k in value]
        members += [(v, content, f"{where}[{shown(k, 60)}]") for k, v in value.items()]
    else:
        if value.keys() != form.keys():
            odd = min(value.keys() ^ form.keys(), key=repr)
            return f"{where} {'has' if odd in value else 'lacks'} {shown(odd, 60)}"
        members = [(value[k], f, k) for k, f in form.items()]
    return next(filter(None, (misfit(*member) for member in members)), "")


def unlike(value, what, where):
    got = f"a tensor {(*value.shape,)}" if hasattr(value, "shape") else shown(value, 60)
    return f"{where} is {got}, expected {what}"
