"""The smallest and the largest work, and what must not change the bits of a run."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import lora
import tiny
import train
from model import load_pretrained
from support import checkpoint, glue, hf_folder
from tools.faults import outcome, same

ROOT = Path(train.__file__).parent


def task_of(path, train_rows, dev_rows):
    path.mkdir()
    for name, rows in (("train", train_rows), ("dev", dev_rows)):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        lines += [f"{label}\t1\t2\t{a}\t{b}" for label, a, b in rows]
        (path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return path


def flags_of(model, task, out, *more):
    text = f"--task mrpc --data-dir {task} --model {model} --r 2 --epochs 2 --lr 0.01 --device cpu"
    return [*text.split(), "--out", str(out), *more]


PAIRS = [(1, "abc", "cba"), (0, "abc", "bca")]


def test_one_example_and_a_batch_larger_than_the_data(tmp_path, capsys):
    model = tiny.bert_folder(tmp_path / "model")
    task = task_of(tmp_path / "task", PAIRS[:1], PAIRS[:1])
    out = tmp_path / "run"
    assert train.main(flags_of(model, task, out, "--batch-size", "50")) == 0
    printed = capsys.readouterr().out
    assert "1 training, 1 development examples" in printed
    assert "all development examples have one label: the metrics say little" in printed
    assert checkpoint.read_last(out)[0]["position"]["step"] == 2


def test_one_label_only_is_refused(tmp_path, capsys):
    model = tiny.bert_folder(tmp_path / "model")
    task = task_of(tmp_path / "task", [PAIRS[0]] * 3, PAIRS)
    assert train.main(flags_of(model, task, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "train.tsv: all 3 examples have one label" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_empty_and_endless_texts(tmp_path, capsys):
    """Truncated, counted and said; an empty pair is its special tokens."""
    model = tiny.bert_folder(tmp_path / "model")
    rows = [(1, "", ""), (0, "word " * 10_000, "b"), (1, "x", "word " * 10_000), (0, "a", "")]
    task = task_of(tmp_path / "task", rows, rows)
    assert train.main(flags_of(model, task, tmp_path / "run")) == 0
    assert "4 examples are longer than 40 tokens: truncated" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["bert", "roberta", "opt", "gpt2"])
def test_an_empty_text_has_a_token_to_read(tmp_path, family):
    tokens = {
        "bert": [*tiny.SPECIALS, "a"],
        "gpt2": ["<|endoftext|>", "a"],
    }.get(family, ["<s>", "<pad>", "</s>", "<unk>", "a"])
    if family == "bert":
        (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    else:
        (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = hf_folder.load_tokenizer(tmp_path, family, 90)
    examples, cut = glue.encode([(("", ""), 0), (("",), 1)], tokenizer, 8)
    model = tiny.model(family, dtype=torch.float32)
    batch = glue.collate(examples, model.config.pad_token_id, model.config.type_vocab_size > 1)
    logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert cut == 0 and logits.isfinite().all() and len(logits) == 2


def test_an_empty_text_without_any_token_is_refused():
    class NoTokens:
        def enable_truncation(self, *args, **kwargs):
            pass

        no_truncation = no_padding = enable_truncation
        truncation = padding = None

        def encode_batch(self, texts):
            ids = [[5] * len(text) for text in texts]
            return [types.SimpleNamespace(ids=i, type_ids=[], overflowing=[]) for i in ids]

        def token_to_id(self, token):
            return None

    assert glue.encode([(("ab",), 0)], NoTokens(), 8)[0][0]["input_ids"] == [5, 5]
    with pytest.raises(ValueError, match="an example's text is empty, and so are its tokens"):
        glue.encode([(("ab",), 0), (("",), 1)], NoTokens(), 8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_layer_one_head_full_rank(family):
    """r as large as the layer; every shortcut that one layer has; the last block is the first."""
    model = tiny.model(family, num_layers=1, num_heads=1)
    lora.inject(model, lora.LINEARS, r=12, shortcuts=lora.SHORTCUTS["all"])
    assert "layers.0.shortcut_ffn" not in lora.adapters(model)
    lora.mark_trainable(model)
    tiny.randomise([a.lora_B for a in lora.adapters(model).values()], 1)
    batch = tiny.batch(model.config)
    whole = model(**batch)
    whole.loss.backward()
    assert all(a.lora_A.grad.any() for a in lora.adapters(model).values())
    alone = model(**{k: v[1:2, :4] if v.ndim == 2 else v[1:2] for k, v in batch.items()})
    torch.testing.assert_close(alone.logits[0], whole.logits[1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="r is 13, allowed: an integer from 1 to 12"):
        lora.inject(tiny.model(family), r=13)


METHODS = {
    "lora": "--preset lora --dropout 0.1",
    "heterolora": "--every 0.5",
    "delta": "--preset delta-lora --delta-ratio 0.5 --delta-start 1",
}


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_change_the_bits(tmp_path, method):
    """Another log frequency, order of targets, PYTHONHASHSEED, process, or a picture of it."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    base = METHODS[method].split()
    variants = {
        "plain": [],
        "log": ["--log-every", "1"],
        "order": ["--targets", "v_proj,q_proj"],
    }
    for name, more in variants.items():
        assert train.main(flags_of(model, task, tmp_path / name, *base, *more)) == 0
    if method == "heterolora":  # the one that goes through sets of names
        environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "train.py", *flags_of(model, task, tmp_path / "hash", *base)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        variants["hash"] = []
    expected = outcome(tmp_path / "plain")
    for name in variants:
        got = outcome(tmp_path / name)
        for key in ("parameters", "optimizer", "metrics", "on", "plan", "delta", "generators"):
            assert same(got["checkpoint"][key], expected["checkpoint"][key]), (name, key)
        assert got["adapter"] == expected["adapter"]


def test_score_batches_do_not_touch_what_does_not_read_them(tmp_path):
    """Scoring consumes no randomness: a random choice is the same after 1 and after 4 batches."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    for n in ("1", "4"):  # snip: 0 everywhere while B is 0, so that the choice is random
        more = ["--allocate", "static", "--proxy", "snip", "--dropout", "0.1", "--score-batches", n]
        assert train.main(flags_of(model, task, tmp_path / n, *more)) == 0
    assert outcome(tmp_path / "1")["adapter"] == outcome(tmp_path / "4")["adapter"]


def test_data_order_depends_on_the_seed_alone(tmp_path):
    """Neither on the method, nor on ranks, targets or the learning rate."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    orders = []
    for more in ([], ["--preset", "delta-lora"], ["--r", "3"], ["--lr", "1", "--targets", "fc1"]):
        args = train.flags.parse_flags(flags_of(model, task, tmp_path / "x", *more))
        run = train.set_up(args)
        orders.append([train.epoch_steps(run, epoch) for epoch in (0, 1)])
    assert all(order == orders[0] for order in orders) and orders[0][0] != orders[0][1]


def test_loading_leaves_the_global_generator_alone(tmp_path):
    folder = tiny.bert_folder(tmp_path / "model")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_pretrained(str(folder))
    assert torch.equal(torch.get_rng_state(), before)
