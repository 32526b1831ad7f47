"""generation.py against loops without a cache, one text at a time; and tools/generate.py."""

import itertools
import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import lora
import tiny
from model import Transformer, load_pretrained
from relatives import METHODS
from support import generation
from support import prompts as prompting
from test_causal import llama_folder
from tools import generate as program

FAMILIES = ("opt", "opt-350m", "gpt2", *tiny.CAUSAL)
LENGTHS = (9, 4, 6)


def problem(family, **overrides):
    m = tiny.adapted(family, shortcuts=lora.SHORTCUTS["all"], head="lm", **overrides).eval()
    batch = tiny.batch(m.config, lengths=LENGTHS)
    return m, batch["input_ids"], batch["attention_mask"]


def prompts(ids, mask):
    return [row[:n].tolist() for row, n in zip(ids, mask.sum(1).tolist(), strict=True)]


def next_logits(m, text):
    """(vocab,) after a list of ids: all of it read anew, alone, without padding."""
    ids = torch.tensor([text])
    with torch.no_grad():
        return m(ids, torch.ones_like(ids)).logits[0, -1]


# -------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("state", ["on", "off", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family, state):
    """Unequal prompts, every place adapted, the shortcuts too; then eleven tokens, one by one."""
    m, ids, mask = problem(family)
    if state == "off":
        lora.switch(m, {"layers.1.v_proj", "layers.1.shortcut_ffn"})
    if state == "merged":
        lora.merge(m)
    forced = torch.randint(5, 90, (11, 3), generator=torch.Generator().manual_seed(1))
    texts = prompts(ids, mask)
    with torch.no_grad():
        logits, cache = generation.read_prompts(m, ids, mask.bool())
        for tokens in forced:
            for row, text in zip(logits, texts, strict=True):
                torch.testing.assert_close(row, next_logits(m, text), rtol=0, atol=1e-12)
            texts = [[*text, t] for text, t in zip(texts, tokens.tolist(), strict=True)]
            logits = generation.read_token(m, tokens, cache)
    assert cache.blocks[0].k.shape == (3, m.config.num_kv_heads, 9 + 11, m.config.head_dim)


# ---------------------------------------------------------------------------------- greedy, sampled


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_likeliest_token_again_and_again(family):
    m, ids, mask = problem(family)
    got = m.generate(ids, 7, attention_mask=mask, eos_token_ids=())
    for text, new in zip(prompts(ids, mask), got.tolist(), strict=True):
        for token in new:
            assert token == next_logits(m, text).argmax()
            text.append(token)


def test_a_text_ends_at_its_end():
    """What the first row writes third and the second sixth become ends: texts of three lengths."""
    m, ids, mask = problem("gemma")
    free = m.generate(ids, 8, attention_mask=mask, eos_token_ids=()).tolist()
    ends = [free[0][2], free[1][5]]
    got = m.generate(ids, 8, attention_mask=mask, eos_token_ids=ends).tolist()
    lengths = set()
    for before, now in zip(free, got, strict=True):
        n = min((i for i, t in enumerate(before) if t in ends), default=7) + 1
        lengths.add(n)
        assert now[:n] == before[:n] and set(now[n:]) <= {m.config.pad_token_id}
    assert len(got[0]) == max(lengths) and len(lengths) > 1
    one = m.generate(ids[:1], 8, eos_token_ids=[free[0][0]])
    assert one.tolist() == [[free[0][0]]]
    parts = list(generation.stream(m, ids, 8, mask, eos_token_ids=ends))
    assert torch.stack(parts, 1).tolist() == got


def test_the_nucleus():
    """Of 0.5, 0.3, 0.15, 0.05: within 0.79 two tokens, within 0.81 three, in their proportions."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64)
    logits = p.log().repeat(40_000, 1)
    for top_p, kept in ((0.4, [1]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        rng = torch.Generator().manual_seed(0)
        counts = generation.choose(logits, 1.0, top_p, rng).bincount(minlength=4)
        expected = torch.zeros(4, dtype=torch.float64)
        expected[kept] = p[kept] / p[kept].sum()
        assert (counts[expected == 0] == 0).all()
        torch.testing.assert_close(counts / 40_000, expected, rtol=0, atol=0.01, check_dtype=False)
    rng = torch.Generator().manual_seed(0)
    counts = generation.choose(logits, 0.5, 1.0, rng).bincount(minlength=4)  # p^2, normalised
    torch.testing.assert_close(
        counts / 40_000, p**2 / (p**2).sum(), rtol=0, atol=0.01, check_dtype=False
    )


def test_the_same_generator_gives_the_same_tokens():
    m, ids, mask = problem("qwen3")

    def sample(seed):
        rng = torch.Generator().manual_seed(seed)
        state = torch.get_rng_state()
        how = {"temperature": 2.0, "top_p": 0.9, "generator": rng}
        tokens = m.generate(ids, 6, attention_mask=mask, eos_token_ids=(), **how)
        assert torch.equal(torch.get_rng_state(), state)
        return tokens.tolist()

    assert sample(1) == sample(1) != sample(2)


# -------------------------------------------------------------------------------------------- beams


def beams_by_hand(m, text, n, steps, eos, length_penalty):
    """Beam search over lists, every text read anew: the best text that ended, or was cut."""
    running, finished = [(0.0, [])], []
    for length in range(1, steps + 1):
        found = []
        for score, new in running:
            log_p = next_logits(m, text + new).log_softmax(-1).tolist()
            found += [(score + p, [*new, token]) for token, p in enumerate(log_p)]
        found = sorted(found, reverse=True)[: (1 + len(eos)) * n]
        over = [new[-1] in eos or length == steps for _, new in found]
        finished += [
            (score / length**length_penalty, new)
            for (score, new), ended in list(zip(found, over, strict=True))[:n]
            if ended
        ]
        finished = sorted(finished, reverse=True)[:n]
        running = [f for f, ended in zip(found, over, strict=True) if not ended][:n]
        if not running:
            break
        if len(finished) == n and running[0][0] / length**length_penalty <= finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize(("n", "penalty"), [(2, 1.0), (3, 0.0), (4, 2.0), (3, -1.0)])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_beams_equal_a_search_by_hand(family, n, penalty):
    m, ids, mask = problem(family)
    with torch.no_grad():
        m.word_embeddings.weight.mul_(0.3)  # flatter: beams differ
    free = m.generate(ids, 6, attention_mask=mask, num_beams=3, eos_token_ids=())
    eos = (free[0, 1].item(), free[1, 3].item())  # so that some texts end, early or late
    how = {"num_beams": n, "length_penalty": penalty, "eos_token_ids": eos}
    got = m.generate(ids, 6, attention_mask=mask, **how)
    for text, new in zip(prompts(ids, mask), got.tolist(), strict=True):
        expected = beams_by_hand(m, text, n, 6, eos, penalty)
        assert new[: len(expected)] == expected
        assert set(new[len(expected) :]) <= {m.config.pad_token_id}


def test_as_many_beams_as_texts_find_the_likeliest_of_all():
    """Ten tokens, two steps, five beams for the first: all 100 texts by hand."""
    m = tiny.model("llama", head="lm", vocab_size=10).eval()
    text = [5, 6, 7]
    first = next_logits(m, text).log_softmax(-1)
    scores = {}
    for a, b in itertools.product(range(10), repeat=2):
        scores[a, b] = (first[a] + next_logits(m, [*text, a]).log_softmax(-1)[b]).item()
    best = max(scores, key=scores.get)
    assert first.argsort(descending=True).tolist().index(best[0]) < 5
    got = m.generate(torch.tensor([text]), 2, num_beams=5, eos_token_ids=())
    assert tuple(got[0].tolist()) == best


# ---------------------------------------------------------------------------------- around the loop


def test_the_model_is_left_as_it_was():
    m, ids, mask = problem("llama3", dropout=0.5)
    expected = m.generate(ids, 4, attention_mask=mask).tolist()
    m.train()
    m.layers[1].eval()
    modes = [module.training for module in m.modules()]
    assert m.generate(ids, 4, attention_mask=mask).tolist() == expected  # no dropout
    beams = [m.generate(ids, 4, attention_mask=mask, num_beams=2).tolist() for _ in range(4)]
    assert beams == beams[:1] * 4
    assert [module.training for module in m.modules()] == modes
    assert all(p.grad is None for p in m.parameters())
    steps = generation.stream(m, ids, 4, mask)
    next(steps)
    assert [module.training for module in m.modules()] == modes and torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 32}, "9 tokens of prompt and 32 new ones are more than the 40"),
        ({"attention_mask": torch.ones(3, 9).cumsum(1) > 1}, "pads on the right"),
        ({"attention_mask": torch.tensor([[1, 1]])}, r"attention_mask is \(1, 2\), input_ids"),
        ({"input_ids": torch.tensor([5, 6])}, r"input_ids is \(2,\), expected \(b, t\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "with a token at least"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-46}, "temperature is 1e-46, allowed: 0 "),  # 0 in float32
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.5}, "do nothing at temperature 0"),
        ({"length_penalty": 2.0}, "length_penalty does nothing without beams"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "length_penalty": 1e6}, "length_penalty is 1000000.0"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature beside num_beams"),
    ],
)
def test_what_is_refused(how, message):
    m, ids, _ = problem("llama")
    with pytest.raises(ValueError, match=message):
        m.generate(**{"input_ids": ids, "max_new_tokens": 3, **how})


def test_a_classifier_does_not_write():
    with pytest.raises(ValueError, match="load it with head="):
        tiny.model("llama").generate(torch.tensor([[5]]), 3)


# -------------------------------------------------------------------------------- tools/generate.py

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def run(tmp_path):
    """A run folder of a tiny LLaMA with a chat template; what it trained changes what it writes."""
    folder = llama_folder(tmp_path / "model", tiny.model("llama", head="lm"))
    about = {"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    m = tiny.adapted("llama", head="lm", dtype=torch.float32, shortcuts=("residual_1",))
    run = tmp_path / "run"
    run.mkdir()
    lora.save_adapter(m, run)
    (run / "config.json").write_text(json.dumps({"flags": {"model": str(folder)}}))
    return run, m


def test_a_run_writes(run, capsys):
    folder, m = run
    said = {}
    for more in ((), ("--no-adapter",), ("--plain",), ("--num-beams", "2")):
        assert program.main(["--run", str(folder), "ab", "--max-new-tokens", "6", *more]) == 0
        said[more] = capsys.readouterr().out
    plain = tiny.model("llama", head="lm", dtype=torch.float32)
    chat = torch.tensor([[2, 4 + 20, 4, 5]])  # <s>, u of the user, a, b
    tokenizer = program.load(argparse_like(folder))[1]
    for model, ids, how, more in (
        (m, chat, {}, ()),
        (plain, chat, {}, ("--no-adapter",)),
        (m, chat[:, 2:], {}, ("--plain",)),
        (m, chat, {"num_beams": 2}, ("--num-beams", "2")),
    ):
        expected = tokenizer.decode(model.eval().generate(ids, 6, **how)[0].tolist())
        assert said[more] == expected + "\n"
    assert len(set(said.values())) > 2


def test_a_run_that_classifies_writes_nothing(run, capsys):
    folder, _ = run
    about = json.loads((folder / "config.json").read_text())
    about["flags"]["task"] = "mrpc"
    (folder / "config.json").write_text(json.dumps(about))
    assert program.main(["--run", str(folder), "ab", "--max-new-tokens", "2"]) == 2
    assert "was trained on mrpc, to classify, and writes no text" in capsys.readouterr().err
    assert program.main(["--run", str(folder), "ab", "--max-new-tokens", "2", "--no-adapter"]) == 0


def argparse_like(folder):
    import types

    return types.SimpleNamespace(run=str(folder), model=None, no_adapter=False)


def test_pieces_of_text_join_to_the_whole():
    """A character of two tokens waits for its second."""

    class Tokenizer:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    whole = "aéb€"
    pieces = list(program.pieces(Tokenizer(), list(whole.encode()), ()))
    assert "".join(pieces) == whole and not any("�" in piece for piece in pieces)
    cut = list(program.pieces(Tokenizer(), [97, 0xC3], ()))
    assert "".join(cut) == "a�"
    ended = list(program.pieces(Tokenizer(), [97, 98, 99, 98], (99,)))
    assert "".join(ended) == "ab"  # the end of the text is no text, nor what comes after it


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),  # on every day
        ("{% if tools is not none %}tools{% endif %}{{ documents is none }}", "True"),
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{{ pad_token }}{{ eos_token }}", "<pad></s>"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "axb"),
    ],
)
def test_a_template_gets_what_transformers_gives_it_and_no_date(template, expected):
    specials = {"pad_token": "<pad>", "eos_token": "</s>"}
    assert prompting.render(template, "x", specials) == expected


def test_the_form_of_a_folder(tmp_path):
    """Of a list of templates the default; a special token is a word, or has one."""
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    path.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "</s>"}}))
    (template, specials), again = prompting.read_form(tmp_path)
    assert template == "b" and specials == again
    assert specials == {"eos_token": "</s>", "bos_token": "", "pad_token": "", "unk_token": ""}
    path.write_text(json.dumps({"chat_template": named[:1]}))
    assert prompting.read_form(tmp_path)[0] is None
    for wrong in {"id": 1}, 5:
        path.write_text(json.dumps({"bos_token": wrong}))
        with pytest.raises(ValueError, match=r"bos_token is .*, no token"):
            prompting.read_form(tmp_path)
    path.write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8: byte 0"):
        prompting.read_form(tmp_path)


SQUARE = ("condlora", "cora", "cora_trained")  # they need q, k, v that are, or of one size


@pytest.mark.parametrize("kind", [kind for kind in METHODS["adapter"] if kind not in SQUARE])
def test_a_run_of_a_relative_writes(run, kind, capsys):
    folder, _ = run
    m = tiny.model("llama", head="lm", dtype=torch.float32)
    lora.inject(m, ("q_proj",), r=3, adapter=METHODS["adapter"][kind])
    tiny.randomise([p for a in lora.adapters(m).values() for p in a.factors().values()], 1)
    lora.save_adapter(m, folder)
    flags = json.loads((folder / "config.json").read_text())["flags"] | {"adapter": kind}
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    assert program.main(["--run", str(folder), "ab", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr().out
    ids = torch.tensor([[2, 4 + 20, 4, 5]])
    tokenizer = program.load(argparse_like(folder))[1]
    assert said == tokenizer.decode(m.eval().generate(ids, 6)[0].tolist()) + "\n"


def test_the_smallest_temperature_is_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])
    rng = torch.Generator().manual_seed(0)
    assert generation.choose(logits, 1e-45, 1.0, rng).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "the chat template fails: no system"),
        ("{% for", "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails"),
    ],
)
def test_a_template_that_fails_is_one_line(template, message):
    with pytest.raises(ValueError, match=message):
        prompting.render(template, "x", {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m", "--no-adapter"], "--no-adapter needs --run"),
        (["--model", "m", "--num-beams", "2", "--temperature", "1"], "beams are not sampled"),
        (["--model", "m", "--length-penalty", "2"], "does nothing without --num-beams"),
        (["--model", "m", "--num-beams", "-3"], "--num-beams is -3, allowed: 1 or more"),
        (["--model", "m", "--seed", "7"], "--seed does nothing without --temperature"),
        (["--run", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_bad_flags_are_one_line(words, message, capsys):
    assert program.main(["a", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_indented_blocks_of_a_template_leave_no_space():
    """As transformers renders: neither before a block nor the line break after it."""
    assert prompting.render("a\n   {% if true %}\nb{% endif %}", "x", {}) == "a\nb"


def test_special_tokens_stand_once_and_no_end_stands_behind_a_prompt(tmp_path):
    """Of a tokenizer that puts its own tokens around a text, as LLaMA's puts one before it."""
    folder = llama_folder(tmp_path / "m", tiny.model("llama", head="lm"))
    tokenizer = load_pretrained(str(folder), head="lm")[1]
    around = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer.post_processor = around
    form = ("{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    assert prompting.ids_of(tokenizer, "ab", form, [3]) == [2, 4, 5]
    assert prompting.ids_of(tokenizer, "ab", None, [3]) == [2, 4, 5]


def test_flags_reach_what_writes(run, monkeypatch, capsys):
    folder, _ = run
    given, real = [], program.generation.stream

    def watched(*arguments, **more):
        given.append((*arguments[4:], more["generator"] and more["generator"].initial_seed()))
        return real(*arguments, **more)

    monkeypatch.setattr(program.generation, "stream", watched)
    words = ["--run", str(folder), "ab", "--max-new-tokens", "3"]
    sampled = [*words, "--temperature", "0.7", "--top-p", "0.6", "--seed"]
    for more in (words, [*sampled, "4"], [*sampled, "5"]):
        assert program.main(more) == 0
    assert given[0] == (0, 1, None) and given[1][:2] == given[2][:2] == (0.7, 0.6)
    assert given[1][2] != given[2][2]
    capsys.readouterr()
    found = []
    monkeypatch.setattr(
        Transformer, "generate", lambda *_, **how: found.append(how) or [torch.tensor([4])]
    )
    assert program.main([*words, "--num-beams", "3", "--length-penalty", "2"]) == 0
    assert found == [{"num_beams": 3, "length_penalty": 2.0}]


def test_a_prompt_that_is_no_utf_8_is_one_line(capsys):
    assert program.main(["a\udcff", "--model", "m"]) == 2
    said = capsys.readouterr().err
    assert said == "generate.py: the prompt is no UTF-8: write it in that encoding\n"
