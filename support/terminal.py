"""Between a run and the person at the terminal: signals, warnings, silence, how a run ended.

The one file of support/ that prints, for train.py and in its name.

What this file does not do: what a run says while it goes on, and its result (train.py).
"""

import contextlib
import os
import shlex
import signal
import sys
import warnings

import torch
from tqdm import tqdm

from support import distributed, run_folder
from support.errors import one_line
from support.run import CannotGoOn


@contextlib.contextmanager
def stop_on_signal(run):
    """Set run.asked_to_stop at the first Ctrl-C or SIGTERM; a second one ends it at once."""

    def request(_signum, _frame):
        run.asked_to_stop = True
        for signum in before:
            signal.signal(signum, signal.default_int_handler)

    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def show_what_can_be_shown():
    """A character that the terminal's encoding does not have is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def warnings_as_notes():
    """Print every UserWarning as one line beside the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: tqdm.write(f"note: {one_line(message)}")
        yield


def watched(batches, what):
    """Batches that show a bar while they are read, where that takes more than a second."""
    return tqdm(batches, what, delay=1, leave=False, unit="batch")


class Watched(list):
    """Batches that are watched while they are scored, as often as they are read."""

    def __iter__(self):
        return iter(watched(list(super().__iter__()), "scoring"))

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Watched(found) if isinstance(index, slice) else found


@contextlib.contextmanager
def silent():
    """Nothing is printed; under torchrun only one process speaks."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def go_on(run):
    """--resume DIR, and what was given beside it this time, if it was; to paste."""
    args, words = run.args, ["--resume", str(run.folder)]
    if args.resume:
        before = run_folder.read_config(run.folder)
        for flag in ("data_dir", "device"):
            if getattr(args, flag) != before[flag]:
                words += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        words += ["--test"] if args.test and not before.get("test") else []
    return shlex.join(words)


def out_of_memory(error):
    """Whether an error is that; PyTorch has a class for it on a GPU, and words on a CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def carry_through(run, begin):
    """Say the notes, call begin(), say how it ended; return the exit code: 0, 1 or 130."""
    again = go_on(run) if run.folder else ""
    before = signal.getsignal(signal.SIGTERM)
    if distributed.world() == 1:  # of several, torchrun ends the others when one is gone
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # also outside the loop
    try:
        for note in run.notes:
            print(note)
        begin()
    except (CannotGoOn, torch.linalg.LinAlgError) as error:  # of a rule that inverts matrices
        print(
            f"train.py: {one_line(error)}; try a smaller --lr, --clip 1 or --warmup 50",
            file=sys.stderr,
        )
        if run.folder and (run.folder / "checkpoint.pt").exists():
            print(f"the last good checkpoint is kept in {run.folder}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"train.py: out of memory: {one_line(error)}; give a smaller --batch-size, with "
            "--accumulate for as many examples a step, or a smaller --max-length",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        what = error if isinstance(error, ConnectionError) else f"cannot write the run: {error}"
        where = f"; go on from its last checkpoint with {again}"
        said = f"{what}{where}" if run.folder else error  # or nothing was being written
        print(f"train.py: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        where = f"; go on from the last checkpoint: {again}" if run.folder else ""
        print(f"stopped at once{where}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if run.stop:
        print(f"stopped and saved; go on with: {distributed.command()} train.py {again}")
        return 130
    return 0
