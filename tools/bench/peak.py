"""How the benchmarks measure memory: the peak of a call, each in a fresh process.

A process keeps what it once asked the system for, so that a second measurement in it would see
the first one's peak. Therefore each one has a process of its own, which loads its model, resets
the peak and only then does the work that is measured.

This file is both sides: in_fresh_process starts `python -m tools.bench.peak MODULE FUNCTION
ARGUMENTS`, and that prints what the function returns.

What this file does not do: measure anywhere but on Linux, which has /proc/self.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def status(field):
    """A field of /proc/self/status in MiB; OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024  # the file has kB
    raise OSError(f"/proc/self/status has no {field}")


def peak_above(work):
    """MiB that work() needs at its peak above what is resident before it."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    work()
    return status("VmHWM") - before


def in_fresh_process(function, **arguments):
    """What function(**arguments) returns in a new Python process.

    Args:
        function: at the top level of a module, returns a number.
        arguments: what JSON can hold.

    Raises:
        RuntimeError: the process failed; the last line that it wrote.
    """
    call = [function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.peak", *call],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{'.'.join(call[:2])} in a new process: {last}")
    return float(done.stdout.split()[-1])


def main(module, function, arguments):
    print(getattr(importlib.import_module(module), function)(**json.loads(arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
