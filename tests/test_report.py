"""support/report.py: what a run says at its end, word for word."""

import pathlib

from support import report

RUN = dict(
    method="dynamic HeteroLoRA",
    adapters=1000,
    stored=1500,
    head=26,
    last={"accuracy": 0.5, "f1": 0.25},
    best={"accuracy": 0.75, "f1": 0.5, "epoch": 2},
    test={"accuracy": 0.625},
    seconds=80.0,
    score_seconds=20.0,
    decisions=6,
    folder=pathlib.Path("runs/x"),
    control=("python train.py --r 2", 960),
    baselines={"words alone": 0.525},
)


def test_the_last_lines_of_a_run():
    assert report.table(**RUN).split("\n") == [
        "method      dynamic HeteroLoRA",
        "trainable   1,000 in adapters + 26 in the head",
        "stored      1,500 in adapters: what is on, and what has learned and is off",
        "final       accuracy 0.5000, f1 0.2500",
        "best        accuracy 0.7500, f1 0.5000 (epoch 2)",
        "beside it   words alone 0.525",
        "test        accuracy 0.6250",
        "seconds     80.0, 20.0 of them (25%) for decisions",
        "decisions   6; python tools/plot.py runs/x",
        "run folder  runs/x",
        "the same budget, spread evenly (960 parameters):",
        "  python train.py --r 2",
    ]


def test_what_a_run_does_not_have_is_not_said():
    plain = {"stored": 1000, "test": None, "decisions": 0, "control": None, "baselines": {}}
    names = [line.split()[0] for line in report.table(**{**RUN, **plain}).split("\n")]
    assert names == ["method", "trainable", "final", "best", "seconds", "run"]
    assert "for decisions" not in report.table(**{**RUN, **plain})
