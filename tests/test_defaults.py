"""What a caller gets who names nothing: the values that the docstrings and the README state."""

import hashlib

import pytest
import torch

import lora
import tiny
from delta_lora import DeltaLoRA
from model import load_pretrained
from relatives import METHODS
from support import download, glue, texts
from support.flags import parse_flags


def test_what_no_tensor_of_minilm_tells_is_as_on_the_hub():
    """Its config.json; the sizes are held against the tensors when these are read."""
    config = download.MINILM_CONFIG
    assert (config["num_attention_heads"], config["hidden_act"]) == (12, "gelu")
    assert (config["layer_norm_eps"], config["pad_token_id"]) == (1e-12, 0)


def test_columns_and_splits_of_the_hub():
    """nyu-mll/glue's columns; its files and those of the text tasks, by their whole paths."""
    two = "sentence1 sentence2"
    columns = {"cola": "sentence", "sst2": "sentence", "mrpc": two, "stsb": two, "rte": two}
    columns |= {"wnli": two, "qqp": "question1 question2", "qnli": "question sentence"}
    for name, expected in columns.items():
        task = glue.TASKS[name]
        assert task.hub_columns == tuple(expected.split()), name
        assert (task.hub_dev, task.hub_test) == ("validation", "test"), name
    assert glue.TASKS["mnli"].hub_columns == ("premise", "hypothesis")
    assert set(glue.TASKS) == {*columns, "mnli", "paraphrase"}
    for name, hub, config in (
        ("e2e", "tuetschek/e2e_nlg", "default"),
        ("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1"),
    ):
        splits = {"train": "train", "dev": "validation", "test": "test"}
        files = {split: f"{config}/{theirs}/*.parquet" for split, theirs in splits.items()}
        assert (texts.TASKS[name].hub, texts.TASKS[name].hub_files) == (hub, files)
    assert texts.TASKS["instructions"].hub_files == {"train": "default/train/*.parquet"}


def test_inject_by_default_is_rank_8_at_scale_2_on_q_and_v():
    model = tiny.model("bert")
    found = lora.inject(model)
    assert set(found) == {f"layers.{i}.{p}_proj" for i in range(3) for p in "qv"}
    for layer in found.values():
        assert (layer.r, layer.scaling, layer.lora_dropout, layer.when_off) == (8, 2.0, 0.0, "out")
    same, another = (lora.inject(tiny.model("bert"), seed=s) for s in (0, 1))
    for name, layer in found.items():
        assert torch.equal(layer.lora_A, same[name].lora_A)
        assert not torch.equal(layer.lora_A, another[name].lora_A)


def test_a_shortcut_has_by_default_scale_one_half_and_a_layer_alone_rank_8_at_scale_2():
    for layer in lora.inject(tiny.model("bert"), (), shortcuts=lora.SHORTCUTS["all"]).values():
        assert (layer.r, layer.scaling) == (8, 0.5)
    layer = lora.LoRALayer(torch.nn.Linear(12, 20), 12, 20)
    assert (layer.r, layer.scaling, layer.lora_dropout) == (8, 2.0, 0.0)
    again = lora.LoRALayer(torch.nn.Linear(12, 20), 12, 20)
    assert not torch.equal(layer.lora_A, again.lora_A)  # drawn from torch's own generator


@pytest.mark.parametrize("name", METHODS["adapter"])
def test_a_relative_alone_has_by_default_rank_8_at_scale_2(name):
    layer = METHODS["adapter"][name](torch.nn.Linear(12, 12), 12, 12)
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout) == (8, 16, 2.0, 0.0)


def test_a_head_is_by_default_of_two_classes_and_drawn_with_seed_0(tmp_path):
    folder = str(tiny.bert_folder(tmp_path / "model"))
    default, same, other = (
        load_pretrained(folder, **kw)[0] for kw in ({}, {"seed": 0}, {"seed": 1})
    )
    assert default.classifier.weight.shape == (2, 12) and default.config.dropout == 0
    assert torch.equal(default.classifier.weight, same.classifier.weight)
    assert default.fresh == ("classifier",)
    rng = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(b"0/head").digest()[:8], "little")
    )
    assert torch.equal(default.classifier.weight, 0.02 * torch.randn(2, 12, generator=rng))
    assert not default.classifier.bias.any()
    assert not torch.equal(default.classifier.weight, other.classifier.weight)


def test_delta_lora_has_by_default_lambda_half_and_moves_the_weight_after_step_502():
    model = tiny.model("bert")
    lora.inject(model)
    lora.mark_trainable(model)
    delta = DeltaLoRA(model)
    assert (delta.ratio, delta.start, delta.lazy) == (0.5, 500, False)


def test_what_train_py_does_where_a_flag_is_not_given():
    args = parse_flags([])
    assert (args.keep, args.every, args.score_batches) == (0.5, 0.5, 4)
    assert (args.weight_decay, args.schedule, args.warmup) == (0.01, "linear", 30)
    assert (args.lr, args.epochs, args.batch_size) == (1e-3, 3, 16)
    assert (args.clip, args.dropout, args.lora_dropout, args.accumulate) == (0, 0, 0, 1)
    args = parse_flags(["--task", "describe"])
    assert (args.epochs, args.batch_size, args.lr, args.warmup) == (1, 8, 2e-3, 10)
    args = parse_flags(["--preset", "heterolora-released"])
    assert (args.lr, args.warmup, args.batch_size, args.epochs) == (2e-4, 0, 8, 20)
    args = parse_flags(["--preset", "uniform-r2"])
    assert (args.r, args.lora_alpha, args.shortcut_alpha) == (2, 4, 1)
    assert parse_flags(["--preset", "delta-lora"]).lr == 5e-4
