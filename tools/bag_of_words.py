"""What words alone decide: logistic regression on a pair's words: python tools/bag_of_words.py
--task paraphrase

Features of a pair: the share of words in common (of the union, and of the shorter text), the
difference in length, and for each word of the training data whether both texts have it, and whether
exactly one has. L2 penalty chosen on a fifth of the training data. A task whose labels this decides
needs no model.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import glue

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def features(examples, vocabulary):
    """(n, 3 + 2 v) float64."""
    rows = np.zeros((len(examples), 3 + 2 * len(vocabulary)))
    for row, (texts, _) in zip(rows, examples, strict=True):
        a, b = words(texts[0]), words(texts[-1])
        shared = len(a & b)
        row[:3] = (
            shared / max(1, len(a | b)),
            shared / max(1, min(len(a), len(b))),
            abs(len(a) - len(b)) / 10,
        )
        for word in a | b:
            if word in vocabulary:
                row[3 + 2 * vocabulary[word] + (word not in a or word not in b)] = 1
    return torch.tensor(rows)


def fit(x, y, penalty):
    """Logistic regression by L-BFGS; returns a function features -> class."""
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda z: (z @ weight + bias > 0).double()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="paraphrase", help="a task with two classes")
    parser.add_argument("--data-dir", help="as in train.py")
    args = parser.parse_args(argv)
    try:
        train, dev = glue.load_task(args.task, args.data_dir)
        if glue.TASKS[args.task].num_labels != 2:
            raise ValueError(f"{args.task} does not have two classes")
    except (ValueError, OSError) as error:
        print(f"bag_of_words.py: {error}", file=sys.stderr)
        return 2
    seen = sorted(set().union(*(words(t) for texts, _ in train for t in texts)))
    vocabulary = {word: i for i, word in enumerate(seen)}
    x, y = features(train, vocabulary), torch.tensor([float(label) for _, label in train]).double()
    held_out = torch.arange(len(y)) % 5 == 0

    def on_held_out(penalty):
        predict = fit(x[~held_out], y[~held_out], penalty)
        return (predict(x[held_out]) == y[held_out]).double().mean().item()

    penalty = max(PENALTIES, key=on_held_out)
    predictions = fit(x, y, penalty)(features(dev, vocabulary))
    metrics = glue.metrics(glue.TASKS[args.task], predictions, [label for _, label in dev])
    print(
        ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), f"(penalty {penalty})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
