"""A base in bfloat16 beside its numbers in float32; a sharded base beside a whole one.

u = 2^-9 is the largest relative error of rounding to bfloat16, which keeps 8 bits. A product rounds
its two factors and its result: 3 u. From the embedding to the logits of a tiny model there are 14
in a row (v, out, fc1, fc2 in each of three blocks, and two in the head), and an error of one is
carried on, in norm, as it is: 42 u.
"""

import json
import re
import types

import pytest
import torch
from torch import nn

import lora
import proxies
import tiny
import train
from allocate import keep_top
from delta_lora import DeltaLoRA
from model import load_pretrained
from relatives import METHODS
from support import checkpoint, distributed, evaluation, flags, large, run_folder
from test_causal import llama_folder
from test_distributed import in_processes, stopped_at, two_epochs
from tools import generate as program

# One after the other: two that look for a free port at once may find the same.
pytestmark = pytest.mark.xdist_group("processes")

U = 2.0**-9
TOLERANCE = 42 * U
FAMILIES = ("bert", "roberta", "opt-350m", "gpt2", "llama", "qwen2", "qwen3", "gemma")
CPU = torch.device("cpu")


def far(got, expected):
    """||got - expected|| / ||expected|| of two tensors, or of two lists of them as one vector."""
    got, expected = (torch.cat([t.flatten().double() for t in x]) for x in (got, expected))
    return ((got - expected).norm() / expected.norm()).item()


def adapted(family, base_dtype="bf16", **overrides):
    """tiny.adapted in float32 with all shortcuts, its base cast."""
    model = tiny.adapted(family, shortcuts=lora.SHORTCUTS["all"], dtype=torch.float32, **overrides)
    large.cast_base(model, base_dtype)
    return model


def gradients(model, batch):
    """(logits, loss, gradients of all that trains)."""
    out = model(**batch)
    parameters = list(lora.trainable(model).values())
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return out.logits.detach(), out.loss.item(), [g for g in found if g is not None]


# ----------------------------------------------------------------------------------- a base in bf16


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_float32_model_of_the_rounded_weights(family):
    """Logits, loss and gradients within 42 u, and not to the bit: products are in bfloat16."""
    heads = ["classification"] + ["lm"] * (family not in ("bert", "roberta"))
    for head in heads:
        model = adapted(family, head=head)
        batch = tiny.batch(model.config)
        logits, loss, found = gradients(model, batch)
        assert {logits.dtype, *(g.dtype for g in found)} == {torch.float32}
        large.cast_base(model, "fp32")
        expected = gradients(model, batch)
        assert 0 < far([logits], [expected[0]]) < TOLERANCE
        assert abs(loss / expected[1] - 1) < TOLERANCE
        assert 0 < far(found, expected[2]) < TOLERANCE
        lora.switch(model, set())  # what is within it is not everything
        assert far([model(**batch).logits.detach()], [expected[0]]) > TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_in_which_dtype(family):
    """Spelt out from the names; and of what flows: norms and blocks take and give float32."""
    model = adapted(family)
    for name, parameter in model.named_parameters():
        wide = "lora_" in name or "norm" in name or name.split(".")[0] in model.head
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    seen, products = set(), set()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.register_forward_hook(lambda _m, x, y: seen.update({x[0].dtype, y.dtype}))
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _x, y: products.add(y.dtype))
    for block in model.layers:
        block.register_forward_hook(lambda _m, x, y: seen.update({x[0].dtype, y[0].dtype}))
    model(**tiny.batch(model.config))
    assert seen == {torch.float32} and products == {torch.bfloat16}


def test_adapters_begin_as_beside_a_float32_base():
    """The base is cast before or after injection: the same A to the bit, 0 bits of it rounded."""
    whole = tiny.model("bert", dtype=torch.float32)
    before, after = (tiny.model("bert", dtype=torch.float32) for _ in range(2))
    large.cast_base(before, "bf16")
    for model in (whole, before, after):
        lora.inject(model, lora.LINEARS, r=3, shortcuts=lora.SHORTCUTS["all"])
    large.cast_base(after, "bf16")
    for name, parameter in whole.named_parameters():
        for other in (before, after):
            found = other.get_parameter(name)
            assert torch.equal(found, parameter.to(found.dtype)), name
            if "lora_" in name or "base" in name:
                assert found.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


@pytest.mark.parametrize("adapter", METHODS["adapter"])
def test_relatives_on_a_base_in_bf16(adapter, tmp_path):
    model = tiny.model("bert", dtype=torch.float32)
    large.cast_base(model, "bf16")
    targets = ("q_proj", "k_proj", "v_proj")
    kind = METHODS["adapter"][adapter]
    lora.inject(model, targets, r=3, lora_alpha=5, adapter=kind)
    batch = tiny.batch(model.config)
    plain = tiny.model("bert", dtype=torch.float32)
    large.cast_base(plain, "bf16")
    # they begin as the base; DoRA adds m / ||V|| - 1 = 0, LoRA-XS 1e-5
    assert far([model(**batch).logits.detach()], [plain(**batch).logits.detach()]) < 2 * U
    tiny.randomise(
        [f for a in lora.adapters(model).values() for k, f in a.factors().items() if k[-1] != "e"]
    )
    lora.mark_trainable(model)
    logits, _, found = gradients(model, batch)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(plain, tmp_path / "adapter.safetensors", adapter=kind)
    large.cast_base(model, "fp32")
    expected = gradients(model, batch)
    assert far([logits], [expected[0]]) < TOLERANCE
    large.cast_base(plain, "fp32")  # what was written on the base in bfloat16
    assert far([plain(**batch).logits.detach()], [expected[0]]) < TOLERANCE
    assert far(found, expected[2]) < TOLERANCE
    assert {f.dtype for a in lora.adapters(model).values() for f in a.parameters()} == {
        torch.float32
    }


def test_doras_norm_is_that_of_the_unrounded_weight():
    """What B A adds counts in ||V||, also where a W in bfloat16 would not hold it."""
    model = tiny.model("bert", dtype=torch.float32)
    large.cast_base(model, "bf16")
    lora.inject(model, ("q_proj",), r=3, lora_alpha=5, adapter=METHODS["adapter"]["dora"])
    layer = model.layers[0].q_proj
    tiny.randomise([layer.lora_A, layer.lora_B], std=1.0)
    with torch.no_grad():
        layer.lora_B.mul_(1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            ratio = layer.ratio(layer.lora_A, layer.lora_B).double()
        W, A, B = (p.double() for p in (layer.base.weight, layer.lora_A, layer.lora_B))
        norm = (W + 5 / 3 * B @ A).norm(dim=1)
        assert ((W.norm(dim=1) - norm) / norm).abs().max() > 1e-4
        assert (ratio - layer.lora_magnitude.double() / norm).abs().max() < 1e-6


@pytest.mark.parametrize("proxy", ["grad_norm", "snip", "fisher", "grad_norm_slot", "snip_slot"])
def test_scores_on_a_base_in_bf16(proxy):
    """Sums of gradients in float32, and the model is left as it was."""
    model = adapted("bert")
    batches = [tiny.batch(model.config, seed) for seed in range(3)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    scores = proxies.score(proxy, model, batches)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
    if proxy == "snip_slot":
        assert {g.dtype for _, g in proxies.slot_gradients(model, batches).values()} == {
            torch.float32
        }
    large.cast_base(model, "fp32")
    expected = proxies.score(proxy, model, batches)
    # fisher is made of squares
    got, wanted = (torch.tensor(list(s.values())) for s in (scores, expected))
    assert 0 < far([got], [wanted]) < (2 if proxy == "fisher" else 1) * TOLERANCE


def test_synflow_is_in_float64_whatever_the_base():
    model = adapted("llama")
    batches = [tiny.batch(model.config)]
    scores = proxies.score("synflow", model, batches)
    large.cast_base(model, "fp32")
    assert scores == proxies.score("synflow", model, batches)


def test_generation_on_a_base_in_bf16():
    """Each token is the likeliest after the text before it, as far as 8 bits can tell."""
    model = adapted("qwen3", head="lm").eval()
    ids = tiny.batch(model.config, lengths=(5, 5))["input_ids"]
    new = model.generate(ids, 6, eos_token_ids=())
    large.cast_base(model, "fp32")
    text = torch.cat([ids, new], 1)
    with torch.no_grad():
        logits = model(text, torch.ones_like(text)).logits[:, 4:-1]  # (2, 6, vocab)
    lost = logits.max(-1).values - logits.gather(-1, new[..., None])[..., 0]
    assert (lost <= 2 * TOLERANCE * logits.norm(dim=-1) / 90**0.5).all()


def test_loading_rounds_what_is_frozen(tmp_path):
    folder = str(tiny.bert_folder(tmp_path / "model"))
    whole, _ = load_pretrained(folder)
    model, _ = load_pretrained(folder, base_dtype="bf16")
    assert model.config.base_dtype == "bf16" and model.head == ("classifier",)
    for name, parameter in whole.named_parameters():
        found = model.get_parameter(name)
        narrow = "norm" not in name and "classifier" not in name
        assert found.dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert torch.equal(found, parameter.to(found.dtype)), name
    for wrong in ("fp8", ["fp32"]):  # the second as a file may have it
        message = re.escape(f"base_dtype is {wrong!r}, allowed: fp32, bf16")
        with pytest.raises(ValueError, match=message):
            large.cast_base(model, wrong)


def test_merging_into_bf16_is_refused_and_into_its_numbers_in_float32_exact():
    model = adapted("llama")
    with pytest.raises(ValueError, match=r"layers.0.q_proj has a weight in torch.bfloat16, which"):
        lora.merge(model)
    rounded = model.layers[0].fc1.base.weight.float()
    large.cast_base(model, "fp32")
    lora.merge(model)
    with pytest.raises(ValueError, match=r"is merged: call unmerge\(model\) first"):
        large.cast_base(model, "bf16")
    layer = model.layers[0].fc1
    expected = rounded.double() + 5 / 3 * (layer.lora_B.double() @ layer.lora_A.double())
    torch.testing.assert_close(layer.base.weight.double(), expected, rtol=1e-6, atol=1e-6)
    lora.unmerge(model)
    assert torch.equal(layer.base.weight, rounded)
    whole = tiny.model("llama").bfloat16()  # its pairs are in bfloat16 as well
    lora.inject(whole, r=2)
    with pytest.raises(ValueError, match=r"has a weight in torch.bfloat16, which .* model.float"):
        lora.merge(whole)


def test_delta_lora_on_bf16_is_lazy_and_exports_what_it_computes():
    """Beside a float32 base of the same numbers, whose weights do move; then as plain LoRA."""

    def trained(base_dtype, lazy):
        model = tiny.adapted("bert", dtype=torch.float32)
        large.cast_base(model, "bf16")
        large.cast_base(model, base_dtype)
        delta = DeltaLoRA(model, ratio=2.0, start=-1, lazy=lazy)
        optimizer = torch.optim.AdamW(lora.trainable(model).values(), lr=0.01)
        for seed in range(4):
            model(**tiny.batch(model.config, seed)).loss.backward()
            delta.before_step()
            optimizer.step()
            delta.after_step()
            optimizer.zero_grad()
        return model, delta

    with pytest.raises(ValueError, match=r"weight in torch.bfloat16: most increments"):
        trained("bf16", False)
    model, delta = trained("bf16", True)
    other, _ = trained("fp32", False)
    batch = tiny.batch(model.config, 9)
    logits = model(**batch).logits.detach()
    assert far([logits], [other(**batch).logits.detach()]) < TOLERANCE
    plain = tiny.model("bert", dtype=torch.float32)
    large.cast_base(plain, "bf16")
    assert far([plain(**batch).logits.detach()], [logits]) > 2 * TOLERANCE
    large.cast_base(plain, "fp32")
    for name, (A, B) in delta.export().items():
        plain.get_submodule(name).weight.data += B @ A
    for name in plain.head:
        plain.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    assert far([plain(**batch).logits.detach()], [logits]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_change_survives_the_lazy_form(dtype):
    """B'A' - BA is 1e-3 of BA, less than a bit of bfloat16: exact to float32 beside the base.

    Also of an input in bfloat16, as out_proj and fc2 get it from the product before them.
    """
    model = adapted("bert")
    layer = model.layers[0].fc1
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)

    def changed():
        with torch.autocast("cpu", torch.bfloat16):
            return layer.base(x).double()

    before = changed()
    delta = DeltaLoRA(model, ratio=2.0, start=-1, lazy=True)
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    delta.before_step()
    with torch.no_grad():
        layer.lora_A *= 1.001
    delta.after_step()
    # lambda s (B A' - B A) x, A' as float32 has it
    expected = 2 * 5 / 3 * x.double() @ (B @ (layer.lora_A.detach().double() - A)).T
    assert far([changed() - before], [expected]) < 1e-3


# ------------------------------------------------------------------------------------ runs on bf16


@pytest.fixture
def argv(tmp_path):
    """21 examples in batches of 5: shares of 3 and 2, and a last batch of one for two processes."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task", 21)
    text = f"--task mrpc --data-dir {task} --model {model} --r 2 --batch-size 5 --lr 0.01"
    return [*text.split(), "--epochs", "2", "--warmup", "0", "--device", "cpu"]


BF16 = ["--base-dtype", "bf16", "--dropout", "0.1", "--every", "0.4", "--score-batches", "2"]


def test_a_run_on_bf16_resumes_to_the_bits(argv, tmp_path):
    """Interrupted in an epoch, between two decisions; what is stored is float32."""
    argv += BF16
    one, out = tmp_path / "one", tmp_path / "out"
    assert train.main([*argv, "--out", str(one)]) == 0
    assert stopped_at(3, 0, *argv, "--out", str(out)) == 130
    assert json.loads((out / "config.json").read_text())["flags"]["base_dtype"] == "bf16"
    assert train.main(["--resume", str(out)]) == 0
    a, b = checkpoint.read_last(one)[0], checkpoint.read_last(out)[0]
    for key in ("parameters", "optimizer", "on", "position"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    assert (one / "adapter.safetensors").read_bytes() == (out / "adapter.safetensors").read_bytes()
    stored = [*a["parameters"].values()]
    stored += [v for state in a["optimizer"]["state"].values() for v in state.values()]
    assert {t.dtype for t in stored} == {torch.float32}


def test_an_adapter_comes_back_to_a_base_in_bf16(argv, tmp_path):
    """What the run ended with, loaded anew: the same logits to the bit."""
    folder = argv[argv.index("--model") + 1]
    args = flags.parse_flags([*argv, *BF16])
    run = train.set_up(args)
    train.train_step(run, [[0, 1, 2], [3, 4]], 0.1)
    lora.save_adapter(run.model, tmp_path)
    model, _ = load_pretrained(folder, base_dtype="bf16")
    lora.load_adapter(model, tmp_path)
    batch = tiny.batch(model.config)
    del batch["labels"]
    model.eval()
    run.model.eval()
    assert torch.equal(model(**batch).logits, run.model(**batch).logits)


def test_what_a_run_on_bf16_writes_comes_from_that_base(tmp_path):
    """tools/generate.py: the model of the run, in the dtype that it was trained beside."""
    folder = llama_folder(tmp_path / "model", tiny.model("llama", head="lm"))
    flags_of_run = {"model": str(folder), "base_dtype": "bf16"}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags_of_run}))
    lora.save_adapter(adapted("llama", head="lm"), tmp_path)
    args = types.SimpleNamespace(run=str(tmp_path), no_adapter=False, model=None)
    model = program.load(args)[0]
    assert model.config.base_dtype == "bf16"
    assert model.layers[0].fc1.base.weight.dtype == torch.bfloat16
    assert model.layers[0].fc1.lora_A.dtype == torch.float32


# ------------------------------------------------------------------------------------- sharded base


@pytest.fixture
def in_float64(monkeypatch):
    """Runs of train.py in float64, in which rounding is 1e-10 at the end."""
    load = train.load_pretrained

    def double(*args, **options):
        model, tokenizer = load(*args, **options)
        return model.double(), tokenizer

    monkeypatch.setattr(train, "load_pretrained", double)


def sharded(model):
    """The model, spread over the processes if there are several."""
    if distributed.world() > 1:
        large.shard(model, CPU)
    return model


RUNS = {
    "lora": "--preset lora --accumulate 2 --clip 0.5",
    "heterolora": "--every 0.4 --score-batches 3",
    "delta": "--preset delta-lora --delta-ratio 0.5 --delta-start 1 --delta-lazy yes",
}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", RUNS)
def test_two_processes_with_half_a_base_each_equal_one(argv, tmp_path, family, method, in_float64):
    """Losses, metrics, A, B and scores to 1e-10; the two between themselves to the bit."""
    if family == "llama":
        folder = llama_folder(
            tmp_path / "llama", tiny.model("llama", dtype=torch.float32, num_labels=2)
        )
        argv[argv.index("--model") + 1] = str(folder)
    argv += RUNS[method].split()

    def run():
        found = two_epochs(argv if distributed.world() == 1 else [*argv, "--shard", "yes"])
        return {key: value for key, value in found.items() if key != "weights"}

    one = run()
    first, second = in_processes(run, 2, tmp_path)
    for key in one:
        torch.testing.assert_close(first[key], one[key], rtol=0, atol=1e-10)
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    assert len(one["history"]) == (6 if method == "heterolora" else 0)
    assert len({h["step"] for h in one["history"]}) == len(one["history"])
    assert len(set(one["losses"])) == len(one["losses"])


def language_steps(family):
    """Of a language model: every score that is offered, two decisions and four steps, and text."""
    model = sharded(tiny.adapted(family, shortcuts=lora.SHORTCUTS["all"], head="lm"))
    batches = [tiny.batch(model.config, s, t) for s, t in enumerate([(9, 4, 6, 3), (5, 8), (7,)])]
    found = {name: proxies.score(name, model, batches) for name in ("grad_norm", "snip", "fisher")}
    optimizer = torch.optim.AdamW(lora.trainable(model).values(), lr=0.01)
    losses = []
    for step in range(4):
        if step % 2 == 0:
            lora.switch(
                model, keep_top(distributed.mean_scores(proxies.score("snip", model, batches)), 0.4)
            )
        batch = batches[step % 3]
        terms = int((batch["labels"][:, 1:] != -100).sum())
        rows, once = distributed.part(list(range(len(batch["labels"]))))
        mine = {key: value[rows] for key, value in batch.items()}
        share = once * int((mine["labels"][:, 1:] != -100).sum()) / terms
        loss = model(**mine).loss * share
        loss.backward()
        parameters = list(lora.training_now(model).values())
        losses += distributed.sum_gradients(parameters, loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    new = model.generate(batches[1]["input_ids"][:, :4], 3, eos_token_ids=())
    trained = {name: p.detach() for name, p in lora.trainable(model).items()}
    return {**found, "losses": losses, "new": new, "trained": trained}


def test_a_sharded_model_that_was_measured_first_trains(tmp_path):
    """What is gathered for the first time without gradients is gathered again with them."""

    def run():
        model = sharded(tiny.adapted("llama", head="lm"))
        batch = tiny.batch(model.config)
        new = model.generate(batch["input_ids"][:, :4], 3, eos_token_ids=())
        rows, once = distributed.part(list(range(len(batch["labels"]))))
        loss = model(**{key: value[rows] for key, value in batch.items()}).loss
        (loss * once).backward()
        return new, all(p.grad is not None for p in lora.training_now(model).values())

    new, trained = run()
    for found, has_gradients in in_processes(run, 2, tmp_path):
        assert trained and has_gradients
        torch.testing.assert_close(found, new, rtol=0, atol=0)


def test_a_block_gets_copies_of_dicts_and_lists(tmp_path):
    """As FSDP's hook on a GPU calls a block: the cache still gets what it reads."""
    model = tiny.adapted("llama", head="lm", seed=4)
    ids = tiny.batch(model.config)["input_ids"][:, :4]
    expected = model.generate(ids, 5, eos_token_ids=())
    from torch.distributed.utils import _to_kwargs

    def copied(_block, args, kwargs):
        (args,), (kwargs,) = _to_kwargs(args, kwargs, CPU, False)
        return args, kwargs

    for block in model.layers:
        block.register_forward_pre_hook(copied, with_kwargs=True)
    assert torch.equal(model.generate(ids, 5, eos_token_ids=()), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sharded_language_model_is_the_whole_one(tmp_path, family):
    """Batches of 4, 2 and 1 examples: the last one is one process's, and the other keeps step."""
    one = language_steps(family)
    first, second = in_processes(lambda: language_steps(family), 2, tmp_path)
    for key in one:
        torch.testing.assert_close(first[key], one[key], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    assert len(set(one["losses"])) == 4


@pytest.mark.parametrize("count", [2, 3])
def test_what_each_process_holds(tmp_path, count):
    """Its part of every weight of every block, at most one block whole at a time, and the rest.

    Counted from the config: four matrices d x d, two d x f, and their biases; 8 bytes a number.
    """

    def measure():
        model = sharded(tiny.adapted("bert", hidden_size=24, ffn_dim=48, embed_dim=24))
        blocks, rest, seen = model.layers, tiny.batch(model.config), []

        def look(*_):
            held = [sum(map(local_bytes, block.parameters())) for block in blocks]
            seen.append(held)

        for block in blocks:
            block.fc1.register_forward_hook(look)
            block.fc1.base.register_full_backward_hook(look)
        look()
        model(**rest).loss.backward()
        look()
        return seen, large.bytes_of_parameters(model)

    results = in_processes(measure, count, tmp_path)
    d, f = 24, 48
    matrices = 8 * (4 * d * d + 2 * d * f + 5 * d + f)  # with their biases
    whole = 8 * (4 * d + 3 * (4 * 2 * d + 2 * (d + f)))  # two norms; r = 3, six adapters
    for seen, (held, total) in results:
        assert seen[0] == seen[-1] == [matrices // count + whole] * 3
        during = seen[1:-1]
        assert len(during) == 6
        for state in during:  # the block that computes, and no other
            assert sorted(state) == [matrices // count + whole] * 2 + [matrices + whole]
        assert total - held == 3 * matrices * (count - 1) // count


def local_bytes(parameter):
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()


def test_shares_that_differ_in_length_keep_step(argv, tmp_path, monkeypatch):
    """Five examples to evaluate in batches of one, or of two: 3 and 2, or 2 and 1 of them."""
    monkeypatch.setattr(evaluation, "EVAL_BATCH_SIZE", 1)

    def predictions():
        run = train.set_up(flags.parse_flags([*argv, "--preset", "lora", *more]))
        assert large.is_sharded(run.model) == (distributed.world() > 1)
        tiny.randomise(lora.trainable(run.model).values(), 3)
        with torch.no_grad():  # both classes are predicted
            logits = run.model(**evaluation.batch_of(run.model, run.dev)).logits
            run.model.classifier.bias -= logits.mean(0)
        return [evaluation.predict(run.model, run.task, run.dev[:n]) for n in (5, 1, 4)]

    more = []
    one = predictions()
    more = ["--shard", "yes"]
    assert in_processes(predictions, 2, tmp_path) == [one, one]
    assert len(set(one[0])) > 1  # so that an order that is lost would show


@pytest.mark.parametrize("items", [[], [1], [1, 2, 3], [1, 2, 3, 4]])
def test_every_process_takes_part_equally_often(tmp_path, items):
    def mine():
        part = distributed.part(items)
        return list(distributed.shares(items)), distributed.even(items), part

    (a, even_a, part_a), (b, even_b, part_b) = in_processes(mine, 2, tmp_path)
    assert [item for item, _ in a] == even_a and [item for item, _ in b] == even_b
    assert len(a) == len(b) == (len(items) + 1) // 2
    assert sorted(item for item, once in a + b if once) == items
    assert part_a == (items[::2], 1 if items else 0)
    assert part_b == ((items[1::2], 1) if len(items) > 1 else (items, 0))


def test_a_sharded_base_in_bf16(argv, tmp_path):
    """Two processes beside one, both in bfloat16: what differs is the cut of the batches."""

    def logits():
        model = sharded(adapted("llama"))
        batch = tiny.batch(model.config)
        found = gradients(model, batch)
        return found[0], found[2]

    one = logits()
    for two in in_processes(logits, 2, tmp_path):
        assert torch.equal(two[0], one[0])
        assert all(torch.equal(g, h) for g, h in zip(two[1], one[1], strict=True))


def test_a_sharded_run_stops_resumes_alone_and_exports(argv, tmp_path, capfd, in_float64):
    """2 processes with half of the base each, one with all of it, 2 again; beside one alone."""
    argv += ["--every", "0.4", "--score-batches", "2", "--log-every", "1"]
    one, out = tmp_path / "one", tmp_path / "out"
    assert train.main([*argv, "--out", str(one)]) == 0
    capfd.readouterr()
    words = [*argv, "--shard", "yes", "--out", str(out)]
    assert in_processes(lambda: stopped_at(3, 1, *words), 2, tmp_path) == [130, 0]
    assert "does nothing" not in capfd.readouterr().out
    assert stopped_at(7, 0, "--resume", str(out)) == 130
    assert capfd.readouterr().out.count("--shard yes does nothing in one process") == 1
    assert in_processes(lambda: train.main(["--resume", str(out)]), 2, tmp_path) == [0, 0]
    a, b = checkpoint.read_last(one)[0], checkpoint.read_last(out)[0]
    for key in ("parameters", "optimizer", "on", "position"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-9)
    logs = [[e["loss"] for e in run_folder.read_log(f) if "loss" in e] for f in (one, out)]
    assert len(logs[0]) == len(logs[1]) == 10
    torch.testing.assert_close(*logs, rtol=0, atol=1e-10)
    model, _ = load_pretrained(argv[argv.index("--model") + 1])
    assert (
        lora.load_adapter(model, out).keys()
        == lora.load_adapter(load_pretrained(argv[argv.index("--model") + 1])[0], one).keys()
    )


def test_what_a_sharded_base_cannot_do_is_refused(argv, tmp_path, capsys):
    assert train.main([*argv, "--shard", "yes", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "start two or more with torchrun" in said
    assert not (tmp_path / "run").exists()

    def refusals():
        model = sharded(tiny.adapted("bert"))
        batches = [tiny.batch(model.config)]
        calls = [lambda n=n: proxies.score(n, model, batches) for n in large.READ_WHOLE]
        calls += [lambda: lora.merge(model), lambda: DeltaLoRA(model, start=-1)]
        said = []
        for call in calls:
            with pytest.raises(ValueError) as error:
                call()
            said.append(str(error.value))
        return said

    *scores, merge, delta = in_processes(refusals, 2, tmp_path)[1]
    for name, message in zip(large.READ_WHOLE, scores, strict=True):
        assert message.startswith(f"{name} cannot score a sharded model: it")
    assert merge.startswith("layers.0.q_proj has a weight that is sharded over")
    assert delta.startswith("layers.0.q_proj has a weight that is sharded over")
