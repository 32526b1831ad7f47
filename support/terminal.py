"""Between a run and the person at the terminal: signals, warnings, silence.

What this file does not do: decide what is said (train.py).
"""

import contextlib
import os
import signal
import warnings

from tqdm import tqdm


@contextlib.contextmanager
def stop_on_signal(run):
    """Set run.asked_to_stop at the first Ctrl-C or SIGTERM; a second one ends it at once."""

    def request(signum, _frame):
        run.asked_to_stop = True
        signal.signal(signum, signal.default_int_handler)

    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def warnings_as_notes():
    """Print every UserWarning as one line beside the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: tqdm.write(f"note: {message}")
        yield


class Watched(list):
    """Batches that show a bar while they are read, where that takes more than a second."""

    def __iter__(self):
        return iter(tqdm(list(super().__iter__()), "scoring", delay=1, leave=False, unit="batch"))

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
