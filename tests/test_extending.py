"""The examples of docs/extending.md, run as they stand; and that what they add works in a run."""

import re
from pathlib import Path

import pytest
import torch

import proxies
import tiny
import train
from support import families, glue

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks():
    """The Python of the page: [(line number, code)]."""
    text = PAGE.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


@pytest.fixture
def copies(monkeypatch, tmp_path):
    """Tables that the examples may write into, and an empty folder to work in."""
    monkeypatch.setattr(proxies, "PROXIES", dict(proxies.PROXIES))
    monkeypatch.setattr(glue, "TASKS", dict(glue.TASKS))
    monkeypatch.chdir(tmp_path)
    yield
    families.FAMILIES.pop("toy", None)  # not a copy: the same dict stands in other modules too


def test_the_examples_run_as_they_stand(copies):
    names, found = {"__name__": "example"}, blocks()
    assert len(found) == 7
    for line, code in found:
        assert "assert " in code, f"the example at line {line} shows nothing"
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)
    assert {"toy", "agreement", "answers"} <= {*families.FAMILIES, *proxies.PROXIES, *glue.TASKS}


def test_a_new_proxy_chooses_in_a_run(monkeypatch, tmp_path):
    """A proxy in PROXIES is all that a decision needs: the best by it are on."""

    def depth(model, batches):
        return {name: float(name.split(".")[1]) for name in proxies.adapters(model)}

    monkeypatch.setattr(proxies, "PROXIES", {**proxies.PROXIES, "depth": depth})
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    given = f"--task mrpc --data-dir {task} --model {model} --r 2 --keep 0.5 --shortcuts none"
    args = train.flags.parse_flags([*given.split(), "--allocate", "static", "--device", "cpu"])
    args.proxy = "depth"  # on the command line once it stands in the file
    run = train.set_up(args)
    train.decide(run)
    on = {n for n, a in train.lora.adapters(run.model).items() if a.enabled}
    assert on == {"layers.1.q_proj", "layers.1.v_proj"}


def test_an_adapter_class_trains_its_own_factors_alone():
    """inject(adapter=…): what is not among factors() stays as it was drawn."""

    class OnlyB(train.lora.LoRALayer):
        def factors(self):
            return {"lora_B": self.lora_B}

    model = tiny.model("bert")
    layers = train.lora.inject(model, ("q_proj",), r=2, lora_alpha=3, adapter=OnlyB)
    train.lora.mark_trainable(model)
    before = {name: a.lora_A.detach().clone() for name, a in layers.items()}
    optimizer = torch.optim.AdamW(train.lora.trainable(model).values(), lr=0.1)
    model(**tiny.batch(model.config)).loss.backward()
    optimizer.step()
    assert all(torch.equal(a.lora_A, before[name]) for name, a in layers.items())
    assert all(a.lora_B.abs().max() > 0.09 for a in layers.values())
