"""A model's predictions on encoded examples, and their metrics; by one process or by several.

    name       | meaning
    examples   | list of encoded examples, as glue.encode or texts.encode gives them
    prediction | a class id, or for regression a score
    perplexity | e^loss, loss = - mean of log p(token | tokens before) over all predicted tokens

What this file does not do: the metrics' formulas (glue.py), what a model writes (writing.py),
decide when to evaluate (train.py).
"""

import math

from support import distributed, glue, report, run_folder, terminal, writing
from support.generation import reading
from support.run import CannotGoOn

EVAL_BATCH_SIZE = 64
EVAL_TOKENS = 2048  # of a language model's batch: each has as many logits as there are words


def batch_of(model, examples):
    """Encoded examples as one batch on the model's device."""
    config, device = model.config, model.word_embeddings.weight.device
    return glue.collate(examples, config.pad_token_id, config.type_vocab_size > 1, device)


def counted(examples):
    """How many numbers a loss is the mean of: examples, of text tasks predicted tokens."""
    label_lists = [e["label"] for e in examples if isinstance(e["label"], list)]
    if not label_lists:
        return len(examples)
    return sum(token != -100 for label in label_lists for token in label[1:])


def predict(model, task, examples):
    """A class id (regression: a score) for each encoded example, in order; the mode is kept.

    Raises:
        CannotGoOn: an output is not finite, as after a step that was too long.
    """
    # by length: little padding, and shares that are alike
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    mine, found = distributed.even(order), []
    with reading(model):
        for indices in glue.in_order(mine, EVAL_BATCH_SIZE):
            batch = batch_of(model, [examples[mine[i]] for i in indices])
            del batch["labels"]
            logits = model(**batch).logits  # (b, labels)
            chosen = logits.argmax(-1) if task.labels else logits[:, 0]  # (b,)
            whole = logits.isfinite().all(-1).tolist()
            found += [c if ok else None for c, ok in zip(chosen.tolist(), whole, strict=True)]
    own = len(distributed.share(order))  # what stands in for one more is another process's
    parts = distributed.gather(dict(zip(mine[:own], found[:own], strict=True)))  # by index
    by_index = {i: prediction for part in parts for i, prediction in part.items()}
    if None in by_index.values():  # in all processes
        raise CannotGoOn("an output of the model is not a finite number")
    return [by_index[i] for i in range(len(examples))]


def of_tokens(examples):
    """Examples by length, cut into batches of EVAL_TOKENS with their padding, or of one."""
    batches = []
    for example in sorted(examples, key=lambda e: len(e["input_ids"])):
        size = len(example["input_ids"])  # the longest so far
        if not batches or (len(batches[-1]) + 1) * size > EVAL_TOKENS:
            batches.append([])
        batches[-1].append(example)
    return batches


def language(model, examples):
    """{"loss", "perplexity"} of a causal model, over all predicted tokens; the mode is kept.

    Raises:
        CannotGoOn: the loss is not finite.
    """
    mine, total, terms = list(distributed.shares(of_tokens(examples))), 0.0, 0
    with reading(model):
        for part, once in terminal.watched(mine, "evaluating"):
            batch = batch_of(model, part)
            n = once * counted(part)
            # loss = sum over batches of n * (their mean loss) / sum of n     n: predicted tokens
            total += model(**batch).loss.item() * n
            terms += n
    total, terms = distributed.sum_numbers([total, float(terms)])
    loss = total / terms
    if not math.isfinite(loss):
        raise CannotGoOn(f"the loss of the model is {loss}")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


def evaluate(model, task, examples):
    """The task's metrics on encoded examples."""
    if task.head == "lm":
        return language(model, examples)
    labels = [example["label"] for example in examples]
    return glue.metrics(task, predict(model, task, examples), labels)


def better(task, new, old):
    """Whether metrics are better than others by the task's headline: a loss is to be small."""
    name = task.metrics[0]
    return new[name] < old[name] if name == "loss" else new[name] > old[name]


# --------------------------------------------------------------------------- a run, at its two ends


def measure(run, split):
    """(metrics of a split, the answers to its prompts or None, what is not measured or "")."""
    return answer(run, split, evaluate(run.model, run.task, getattr(run, split)))


def answer(run, split, metrics):
    """As measure, where the metrics of the examples are there already."""
    prompts, why = run.prompts.get(split), ""
    if not prompts:
        return metrics, None, why
    written = writing.write(run.model, run.tokenizer, prompts)
    metrics = {**metrics, "bleu": writing.bleu(prompts, written)}
    if run.task.java and distributed.rank() == 0:
        more, why = writing.with_java(prompts, written)
        metrics |= more
    return metrics, written, why


def of_untouched(run):
    """Before the first step, of a task that wants it: the metrics of dev, logged; a line, or ""."""
    if run.task.head != "lm" or not run.task.before or run.step:
        return ""
    metrics, _, _ = measure(run, "dev")
    if run.folder:
        run_folder.log(run.folder, "eval", step=0, epoch=0, **metrics)
    return f"untouched: {report.show(metrics)}\n"


def at_the_end(run):
    """What is measured once, after the last step: what dev's prompts are answered with, and test.

    No choice looks at it: not the best epoch, not a decision. Of test that is its metrics, and
    every prediction (a character for a class).

    Returns:
        lines for the person who waits, or "".
    """
    notes = []
    if run.prompts.get("dev"):
        run.last, run.written["dev"], why = answer(run, "dev", run.last)
        notes.append(why)
    if run.test is not None and run.task.head == "lm":
        run.test_metrics, written, why = measure(run, "test")
        run.written |= {"test": written} if written else {}
        notes.append(why)
    elif run.test is not None:
        predictions = predict(run.model, run.task, run.test)
        labels = [example["label"] for example in run.test]
        run.test_metrics = glue.metrics(run.task, predictions, labels)
        separator = "" if run.task.labels else " "
        run.test_predictions = separator.join(map(str, predictions))
    return "".join(f"{note}\n" for note in dict.fromkeys(filter(None, notes)))


def as_it_stands(run, source):
    """The metrics of dev, and of the test set where it was asked for, in lines.

    Args:
        source: function (split) -> where its examples lie, in words.
    """
    run.last = evaluate(run.model, run.task, run.dev)
    notes = at_the_end(run)
    lines = [f"{len(run.dev)} examples of {source('dev')}", report.show(run.last)]
    if run.test_metrics:
        lines.append(f"{len(run.test)} examples of {source('test')}")
        lines.append(f"test: {report.show(run.test_metrics)}")
    return "\n".join([*lines, notes + answered(run)]).rstrip("\n")


def answered(run):
    """A few prompts of the last split with their answers and references, in lines; or ""."""
    split = next(reversed(run.written), None)
    if split is None:
        return ""
    return "\n" + writing.beside_references(run.prompts[split], run.written[split]) + "\n"
