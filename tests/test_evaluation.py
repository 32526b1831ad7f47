"""Predictions and metrics: in eval mode, in the order of the examples, and the mode is kept."""

import types

import pytest
import torch

import lora
import tiny
from support import evaluation, glue, texts
from support.run import CannotGoOn
from tools import compare


def examples_of(model, n=70):
    """More than one batch, of mixed lengths, with labels that are not in order."""
    rng = torch.Generator().manual_seed(3)
    found = []
    for i in range(n):
        size = 2 + (7 * i) % 11
        ids = torch.randint(5, model.config.vocab_size, (size,), generator=rng).tolist()
        types = [0] + [1] * (size - 1)
        found.append({"input_ids": ids, "token_type_ids": types, "label": i % 2})
    return found


@pytest.mark.parametrize(("task", "labels", "separator"), [("mrpc", 2, ""), ("stsb", 1, " ")])
def test_predictions_on_record_can_be_read_back(task, labels, separator):
    """A character an example; of numbers, a number and a space."""
    model = tiny.model("bert", num_labels=labels)
    examples = [
        {"input_ids": [1, 4 + i, 2], "token_type_ids": [0, 0, 0], "label": 1} for i in range(3)
    ]
    about = {
        "model": model,
        "task": glue.TASKS[task],
        "test": examples,
        "prompts": {},
        "written": {},
    }
    run = types.SimpleNamespace(**about)
    evaluation.at_the_end(run)
    found = run.test_predictions.split(separator) if separator else list(run.test_predictions)
    assert [float(x) for x in found] == evaluation.predict(model, run.task, examples)


@pytest.mark.parametrize("task, labels", [("mrpc", 2), ("stsb", 1)])
@pytest.mark.parametrize("training", [True, False])
def test_predictions_are_those_of_each_example_alone_without_dropout(task, labels, training):
    model = tiny.adapted("bert", seed=11, num_labels=labels, dropout=0.5)  # of both classes
    for layer in lora.adapters(model).values():
        layer.lora_dropout = 0.5
    examples = examples_of(model)
    model.eval()
    expected = []
    for e in examples:
        ids, types = torch.tensor([e["input_ids"]]), torch.tensor([e["token_type_ids"]])
        logits = model(ids, torch.ones_like(ids), types).logits[0].tolist()
        expected.append(logits[0] if labels == 1 else float(logits[1] > logits[0]))
    assert len(set(expected)) > 1
    model.train(training)
    before = torch.get_rng_state()
    found = evaluation.predict(model, glue.TASKS[task], examples)
    assert found == pytest.approx(expected, abs=1e-12)
    assert model.training is training and model.layers[0].training is training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("task", ["mrpc", "stsb", "e2e"])
def test_outputs_that_are_not_finite_are_no_predictions(task):
    """argmax of NaN would be a class; and every module is back in its own mode afterwards."""
    family, how = ("gpt2", {"head": "lm"}) if task == "e2e" else ("bert", {"num_labels": 1})
    if task == "mrpc":
        how = {"num_labels": 2}
    model, task = tiny.adapted(family, **how).train(), {**glue.TASKS, **texts.TASKS}[task]
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    examples = examples_of(model)
    for example in examples if task.head == "lm" else []:
        example["label"] = example["input_ids"]
    assert evaluation.evaluate(model, task, examples)
    with torch.no_grad():
        model.layers[1].attn_norm.bias[0] = float("inf")
    with pytest.raises(
        CannotGoOn, match=r"is not a finite number|loss of the model is nan"
    ) as error:
        evaluation.evaluate(model, task, examples)
    assert any(words in str(error.value) for words in compare.DIVERGED)  # a study knows it
    assert [module.training for module in model.modules()] == modes


def test_metrics_count_what_was_predicted():
    model = tiny.adapted("bert", seed=11, num_labels=2, dropout=0.5).train()
    examples, task = examples_of(model), glue.TASKS["mrpc"]
    right = sum(
        class_id == e["label"]
        for class_id, e in zip(evaluation.predict(model, task, examples), examples, strict=True)
    )
    assert evaluation.evaluate(model, task, examples)["accuracy"] == pytest.approx(right / 70)
    assert 0 < right < 70


def test_of_equal_epochs_the_first_is_the_best():
    for task, name in ((glue.TASKS["mrpc"], "accuracy"), (texts.TASKS["e2e"], "loss")):
        assert not evaluation.better(task, {name: 0.5}, {name: 0.5})
        assert evaluation.better(task, {name: 0.6}, {name: 0.5}) == (name == "accuracy")
