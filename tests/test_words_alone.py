"""tools/words_alone.py: the number beside the embedded task's results, and that it finds words."""

import json

import torch

from support import glue
from tools import words_alone

TEXTS = [(("The cat sat.", "the cat, sat"), 1), (("a dog", "a cat barks"), 0)]


def test_the_number_for_the_embedded_task():
    """Where the task changes: put what `python -m tools.words_alone` prints into the file."""
    folder = glue.task_folder("paraphrase", None)
    quoted = json.loads((folder / "baselines.json").read_text())["words alone"]
    train, dev = glue.load_task("paraphrase")
    predictions, _ = words_alone.classify(train, dev)
    right = sum(p == label for p, (_, label) in zip(predictions, dev, strict=True))
    assert round(right / len(dev), 4) == quoted


def test_features_by_hand():
    """a, cat, dog known; barks is not, and counts in the shares alone."""
    got = words_alone.features(TEXTS, {"a": 0, "cat": 1, "dog": 2})
    expected = [[1, 1, 0, 0, 0, 1, 0, 0, 0], [1 / 4, 1 / 2, 0.1, 1, 0, 0, 1, 0, 1]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_one_word_that_decides_is_found():
    train = [((f"x{i}", "yes" if i % 2 else "no"), i % 2) for i in range(40)]
    dev = [((f"z{i}", "yes" if i % 3 else "no"), int(i % 3 > 0)) for i in range(9)]
    assert words_alone.classify(train, dev)[0] == [label for _, label in dev]


def test_the_fit_is_the_minimum_of_its_loss():
    """One feature: where the class changes, -b / w, against a search over a grid of w and b."""
    x, y, c = [1.0, -1.0, 2.5, 0.3, -0.5], [1, 0, 1, 0, 1], 0.3
    grid = torch.linspace(-4, 4, 801, dtype=torch.float64)
    w, b = grid[:, None], grid[None, :]
    loss = c * w.square() + sum(
        torch.log1p(torch.exp(-(2 * label - 1) * (w * value + b))) / len(x)
        for value, label in zip(x, y, strict=True)
    )
    i, j = divmod(loss.argmin().item(), len(grid))
    predict = words_alone.fit(torch.tensor(x).double()[:, None], torch.tensor(y).double(), c)
    classes = predict(grid[:, None])
    changes = grid[1:][classes.diff() != 0]
    assert grid[i] > 0.05 and len(changes) == 1  # a slope, and one change of class
    assert abs(changes.item() + grid[j] / grid[i]) < 0.1


def test_what_no_memory_holds_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(words_alone, "MOST", 1e6)
    assert words_alone.main([]) == 2
    error = capsys.readouterr().err
    assert "examples of " in error and "allowed: 0: give a smaller task" in error


def test_command_line(capsys):
    assert words_alone.main(["--task", "sst2", "--data-dir", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("tools.words_alone: ")
