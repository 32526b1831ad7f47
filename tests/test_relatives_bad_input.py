"""What a relative cannot do ends python train.py with one line, exit code 2, and no run folder.

On a BERT of hidden size 12, feed-forward 18, whose first query weight has rank 2.
"""

import pytest
import torch

import tiny
import train

QKV = "--targets q_proj,k_proj,v_proj"
CASES = {  # flags -> what is said
    # what a layer cannot have
    "--adapter condlora --targets q_proj,fc1": "needs square weights, this one is 18 x 12",
    "--adapter prolora --targets fc1": "4 copies of a chunk do not make 18 out_features",
    "--adapter prolora --targets fc2": "4 copies of a chunk do not make 18 in_features",
    "--adapter lora_xs --targets q_proj --r 3": "r is 3, and a weight has rank 2",
    "--adapter lora_xs --targets v_proj --r 13": "r is 13, allowed: an integer from 1 to 12",
    "--adapter dora --targets k_proj": "row 0 of a weight is zero",
    "--adapter cora --targets q_proj,v_proj": "needs the targets q_proj,k_proj,v_proj",
    f"--adapter tied {QKV} --r 13": "r is 13, allowed: an integer from 1 to 12",
    f"--adapter condlora {QKV} --r 13": "r is 13, allowed: an integer from 1 to 12",
    # a budget that sharing makes meaningless
    f"--adapter tied {QKV} --allocate static --budget-params 99": "a single one has no price",
    f"--adapter condlora {QKV} --allocate dynamic --budget-params 99": "a single one has no price",
    f"--adapter tied {QKV} --allocate static --budget-params 99 --per-rank yes": "share A and B",
    # an allocator with another one, and with what is another one's
    "--allocate adalora --allocate alora": "--allocate adalora and --allocate alora: a run has one",
    "--allocate=static --allocate adalora": "--allocate static and --allocate adalora: a run has",
    "--allocate adalora,alora": "'adalora,alora' is not one of none, static, dynamic, adalora",
    "--allocate alora --keep 0.5": "alora has a rule and a budget of its own",
    "--allocate adalora --budget-params 99": "adalora has a rule and a budget of its own",
    "--allocate adalora --proxy snip": "adalora has a rule and a budget of its own",
    "--allocate adalora --score-batches 1": "adalora has a rule and a budget of its own",
    "--allocate alora --when-off frozen": "alora has a rule and a budget of its own",
    "--allocate adalora --adapter dora": "it brings an adapter of its own",
    "--allocate alora --optimizer lora_rite": "each rank has moments of its own",
    "--allocate adalora --keep 0.01": "--keep 0.01 of 12 ranks is none: give more",
    "--allocate alora --epochs 1": "moves ranks after the first epoch: give --epochs 2",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, task)."""
    root = tmp_path_factory.mktemp("folders")
    tensors = tiny.bert_tensors()
    tensors = {n: t.narrow(0, 0, 18) if len(t) == 20 else t for n, t in tensors.items()}
    for i in range(2):
        name = f"bert.encoder.layer.{i}.output.dense.weight"
        tensors[name] = tensors[name][:, :18]
    left, right = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(1))
    tensors["bert.encoder.layer.0.attention.self.query.weight"] = left @ right.T
    tensors["bert.encoder.layer.1.attention.self.key.weight"][0] = 0
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    model = tiny.bert_folder(root / "model", tensors, intermediate_size=18)
    return model, tiny.task_folder(root / "task")


def run(folders, out, words):
    model, task = folders
    given = f"--task mrpc --data-dir {task} --model {model} --device cpu --shortcuts none"
    rank = "" if "--r " in words else "--r 3"
    epochs = "" if "--epochs" in words else "--epochs 2"
    return train.main([*f"{given} {rank} {epochs} --out {out} {words}".split()])


@pytest.mark.parametrize("words", CASES)
def test_bad_input_is_one_line(folders, tmp_path, words, capsys):
    assert run(folders, tmp_path / "run", words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("train.py: ") and said.err.count("\n") == 1
    assert CASES[words] in said.err and not said.out
    assert not (tmp_path / "run").exists()


def test_one_allocator_said_twice_is_one(folders, tmp_path):
    words = "--allocate=alora --batch-size 24 --warmup 0 --score-batches 1 --allocate alora"
    assert run(folders, tmp_path / "run", words) == 0


def test_rite_with_fewer_tokens_than_r_trains_and_says_so(folders, tmp_path, capsys):
    """The last block is read at one token an example: 2 examples a step, r 3."""
    words = "--optimizer lora_rite --allocate none --batch-size 2 --warmup 0 --targets q_proj"
    assert run(folders, tmp_path / "run", words) == 0
    said = capsys.readouterr().out
    assert "--optimizer lora_rite: a step's 2 examples are 2 tokens where the last block" in said
    assert "nan" not in said
