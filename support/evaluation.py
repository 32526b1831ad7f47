"""A model's predictions on encoded examples, and their metrics; by one process or by several.

    name       | meaning
    examples   | list of encoded examples, as glue.encode gives them
    prediction | a class id, or for regression a score

What this file does not do: the metrics' formulas (glue.py), decide when to evaluate (train.py).
"""

import torch

from support import distributed, glue

EVAL_BATCH_SIZE = 64


def batch_of(model, examples):
    """Encoded examples as one batch on the model's device."""
    config, device = model.config, model.word_embeddings.weight.device
    return glue.collate(examples, config.pad_token_id, config.type_vocab_size > 1, device)


@torch.inference_mode()
def predict(model, task, examples):
    """A class id (regression: a score) for each encoded example, in order; the mode is kept."""
    training = model.training
    model.eval()
    # by length: little padding, and shares that are alike
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    mine, found = distributed.even(order), []
    for indices in glue.in_order(mine, EVAL_BATCH_SIZE):
        batch = batch_of(model, [examples[mine[i]] for i in indices])
        del batch["labels"]
        logits = model(**batch).logits  # (b, labels)
        found += (logits.argmax(-1) if task.labels else logits[:, 0]).tolist()
    model.train(training)
    own = len(distributed.share(order))  # what stands in for one more is another process's
    parts = distributed.gather(dict(zip(mine[:own], found[:own], strict=True)))  # by index
    by_index = {i: prediction for part in parts for i, prediction in part.items()}
    return [by_index[i] for i in range(len(examples))]


def evaluate(model, task, examples):
    """The task's metrics on encoded examples."""
    labels = [example["label"] for example in examples]
    return glue.metrics(task, predict(model, task, examples), labels)


def evaluate_test(run):
    """The test set once, at the end: its metrics, and every prediction (a character for a class).

    No choice looks at them: not the best epoch, not a decision.
    """
    if run.test is None:
        return
    predictions = predict(run.model, run.task, run.test)
    labels = [example["label"] for example in run.test]
    run.test_metrics = glue.metrics(run.task, predictions, labels)
    separator = "" if run.task.labels else " "
    run.test_predictions = separator.join(map(str, predictions))
