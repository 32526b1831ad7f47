"""What words alone decide, without a model: python -m tools.words_alone --task paraphrase

Logistic regression on the words of a pair. A task that it solves needs no model, and a model that
does no better has learned nothing else. The embedded task's accuracy stands in
data/paraphrase/baselines.json, and tests/test_words_alone.py keeps it true.

    name      | symbol | shape
    features  | x      | (n, 3 + 2 v)  share of words in common (of the union, of the shorter text),
                                       difference in length; for each of v words of the training
                                       data: both texts have it, exactly one has it
    weight    | w      | (3 + 2 v,)
    penalty   | c      | number        chosen on each fifth example of the training data

What this file does not do: tasks with more than two classes.
"""

import argparse
import re
import sys

import torch
import torch.nn.functional as F

from support import glue
from support.errors import one_line
from support.flags import Parser

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
MOST = 4e9  # bytes of a matrix


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def features(examples, vocabulary):
    """(texts, label) pairs -> (n, 3 + 2 v), float64; vocabulary: word -> 0 … v - 1.

    Raises:
        ValueError: it would not fit into MOST bytes.
    """
    size = 8 * len(examples) * (3 + 2 * len(vocabulary))
    if size > MOST:
        raise ValueError(
            f"{len(examples):,} examples of {len(vocabulary):,} words need {size / 1e9:.0f} GB, "
            f"allowed: {MOST / 1e9:.0f}: give a smaller task"
        )
    rows = torch.zeros(len(examples), 3 + 2 * len(vocabulary), dtype=torch.float64)
    for row, (texts, _) in zip(rows, examples, strict=True):
        a, b = words(texts[0]), words(texts[-1])
        shared = len(a & b)
        row[0] = shared / max(1, len(a | b))
        row[1] = shared / max(1, min(len(a), len(b)))
        row[2] = abs(len(a) - len(b)) / 10
        for word in (a | b) & vocabulary.keys():
            row[3 + 2 * vocabulary[word] + (word not in a & b)] = 1
    return rows


def fit(x, y, penalty):
    """Minimise mean_i log(1 + exp(-y'_i (w x_i + b))) + c ||w||^2, y' = 2 y - 1, by L-BFGS.

    Args:
        x: (n, features). y: (n,), 0 or 1. penalty: c.

    Returns:
        function (n, features) -> (n,) of classes, 0 or 1.
    """
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda z: (z @ weight + bias > 0).long()


def classify(train, dev):
    """(predictions for dev, the penalty that was chosen); train, dev: lists of (texts, label)."""
    seen = sorted(set().union(*(words(text) for texts, _ in train for text in texts)))
    vocabulary = {word: i for i, word in enumerate(seen)}
    x, y = features(train, vocabulary), torch.tensor([label for _, label in train]).double()
    held_out = torch.arange(len(y)) % 5 == 0

    def right_on_held_out(penalty):
        predict = fit(x[~held_out], y[~held_out], penalty)
        return (predict(x[held_out]) == y[held_out]).sum().item()

    penalty = max(PENALTIES, key=right_on_held_out)
    return fit(x, y, penalty)(features(dev, vocabulary)).tolist(), penalty


def main(argv=None):
    """Exit code: 0 done, 2 bad input."""
    parser = Parser(
        prog="python -m tools.words_alone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", default="paraphrase", help="a task with two classes")
    parser.add_argument("--data-dir", help="as of train.py")
    try:
        args = parser.parse_args(argv)
        train, dev = glue.load_task(args.task, args.data_dir)
        task = glue.TASKS[args.task]
        if task.num_labels != 2:
            raise ValueError(f"{args.task} does not have two classes")
        predictions, penalty = classify(train, dev)
    except (ValueError, OSError) as error:
        print(f"tools.words_alone: {one_line(error, 600)}", file=sys.stderr)
        return 2
    metrics = glue.metrics(task, predictions, [label for _, label in dev])
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{shown} (penalty {penalty})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
