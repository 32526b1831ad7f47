"""model.py against dense.py (explicit matrices, one example at a time), and what it refuses."""

import dataclasses
import math

import pytest
import torch

import dense
import model
import tiny
from model import Config

CASES = [(f, "classification") for f in tiny.FAMILIES] + [
    ("opt", "lm"),
    ("opt-350m", "lm"),
    ("gpt2", "lm"),
]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_logits_equal_the_dense_derivation(family, head):
    """Padding, positions, masks, heads and the layer that is computed at one position only."""
    m = tiny.model(family, head=head).eval()
    batch = tiny.batch(m.config)
    got, expected = m(**batch).logits, dense.logits(m, batch)
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        ours = got[i, :n] if head == "lm" else got[i]
        torch.testing.assert_close(ours, expected[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_last_layer_at_one_position_equals_all_positions(family, every_token):
    """Where a module of it has to see every token, the one position is picked afterwards."""
    m = tiny.adapted(family, shortcuts=("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"))
    m.layers[-1].fc1.every_token = every_token
    batch = tiny.batch(m.config)
    mask = batch["attention_mask"].bool()
    x = m.embed(batch["input_ids"], batch.get("token_type_ids"))
    everywhere = m.encode(x, mask)
    read = mask.sum(1) - 1 if m.config.causal else torch.zeros(len(mask), dtype=torch.long)
    picked = everywhere[torch.arange(len(mask)), read]
    torch.testing.assert_close(m.encode(x, mask, read)[:, 0], picked, rtol=0, atol=1e-12)


def test_a_head_of_its_own_is_one_matrix():
    for tied, names in ((True, set()), (False, {"lm_head.weight"})):
        m = tiny.model("llama", head="lm", tied=tied)
        assert {n for n, _ in m.named_parameters() if "head" in n} == names


def test_word_embeddings_are_scaled():
    """As Gemma does: by 1 nothing changes, by 2 or 3 all is so many times as large."""
    ids = torch.tensor([[7, 8, 9]])
    once = tiny.model("llama").embed(ids)
    for factor in (2.0, 3.0):
        assert torch.equal(tiny.model("llama", embed_scale=factor).embed(ids), factor * once)


def test_a_block_alone():
    """Called with what it cannot do without: all positions, no rotation, no cache."""
    m = tiny.model("bert")
    batch = tiny.batch(m.config, lengths=(6, 6))
    x = m.embed(batch["input_ids"])
    q, k, v = m.layers[0].heads(x, x)
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(4)).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(2, 6, 12)
    expected = m.layers[0].out_proj(expected)
    got = m.layers[0].attention(x, x, None, False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    h, ffn_input = x, None
    for block in m.layers:
        h, ffn_input = block(h, ffn_input, None)
    assert torch.equal(h, m.encode(x, batch["attention_mask"].bool()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_and_company_change_nothing(family):
    """An example alone, unpadded, has the logits that it has in a padded batch."""
    m = tiny.model(family)
    batch = tiny.batch(m.config)
    together = m(**batch).logits
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {k: v[i : i + 1, :n] for k, v in batch.items() if k != "labels"}
        torch.testing.assert_close(m(**alone).logits[0], together[i], rtol=0, atol=1e-12)


def test_losses():
    """Cross-entropy, squared error and the shifted language-model loss, written out."""
    m = tiny.model("bert")
    batch = tiny.batch(m.config)
    out = m(**batch)
    p = out.logits.detach().softmax(1)
    expected = -sum(math.log(p[i, y]) for i, y in enumerate(batch["labels"].tolist())) / 3
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)

    m = tiny.model("roberta", num_labels=1)
    batch = tiny.batch(m.config)
    out = m(**batch)
    errors = [(out.logits[i, 0].item() - batch["labels"][i].item()) ** 2 for i in range(3)]
    assert out.loss.item() == pytest.approx(sum(errors) / 3, abs=1e-6)

    m = tiny.model("gpt2", head="lm").eval()
    batch = tiny.batch(m.config)
    out, terms = m(**batch), []
    for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        for t in range(n - 1):
            log_p = out.logits[i, t] - out.logits[i, t].exp().sum().log()
            terms.append(-log_p.detach()[batch["input_ids"][i, t + 1]].item())
    assert out.loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_language_model_loss_is_of_the_labelled_tokens_alone():
    """Some labels, by hand from dense logits; in train mode no others are computed."""
    m = tiny.model("gpt2", head="lm")
    batch = tiny.batch(m.config, lengths=(9, 4, 6))
    for i, prompt in enumerate((3, 1, 5)):  # -100 there; a label on token 0 has no prediction
        batch["labels"][i, :prompt] = -100
    batch["labels"][1, 0] = 7
    chosen, rows = [], dense.logits(m, batch)
    for i, t in [(0, t) for t in range(3, 9)] + [(1, 1), (1, 2), (1, 3), (2, 5)]:
        log_p = rows[i][t - 1].log_softmax(0)
        chosen.append((rows[i][t - 1], -log_p[batch["input_ids"][i, t]]))
    expected = torch.stack([loss for _, loss in chosen]).mean()
    trained, evaluated = m(**batch), m.eval()(**batch)
    for out in (trained, evaluated):
        torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-12)
    predicted = torch.stack([logits for logits, _ in chosen])  # (10, vocab)
    torch.testing.assert_close(trained.logits, predicted, rtol=0, atol=1e-12)
    assert evaluated.logits.shape == (3, 9, 90)
    theirs, ours = (
        torch.autograd.grad(loss, m.layers[0].fc1.weight)[0] for loss in (expected, trained.loss)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_inputs_embeds_stand_for_input_ids():
    m = tiny.model("opt-350m")
    batch = tiny.batch(m.config)
    expected = m(**batch)
    embeds = m.word_embeddings(batch.pop("input_ids"))
    assert torch.equal(m(None, inputs_embeds=embeds, **batch).logits, expected.logits)


def test_dropout_is_off_in_eval_and_random_in_train():
    m, plain = tiny.model("bert", dropout=0.5), tiny.model("bert")
    batch = tiny.batch(m.config)
    m.eval()
    assert torch.equal(m(**batch).logits, plain(**batch).logits)
    m.train()
    torch.manual_seed(0)
    first = m(**batch).logits
    assert not torch.equal(first, m(**batch).logits)


@pytest.mark.parametrize(("family", "kept"), [("bert", 0.5), ("roberta", 0.25)])
def test_dropout_in_the_head(family, kept):
    """Behind the pooler, and in RoBERTa before it too; through identities all is seen."""
    m = tiny.model(family, dropout=0.5, num_labels=12).train()
    for linear in (m.pooler, m.classifier):
        linear.weight.data, linear.bias.data = torch.eye(12).double(), torch.zeros(12).double()
    torch.manual_seed(0)
    got = m.predict(torch.full((2000, 1, 12), 0.3, dtype=torch.float64))
    # what is kept is divided by 0.5, each time
    expected = 2 * math.tanh(0.3 if family == "bert" else 0.6)
    assert got.unique().tolist() == pytest.approx([0.0, expected], abs=1e-12)
    assert (got != 0).double().mean().item() == pytest.approx(kept, abs=0.01)
    assert torch.equal(m.eval().predict(got[:, None]), got.tanh())


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[0, 0, 0]]])
def test_padding_elsewhere_than_right_is_refused(mask):
    m = tiny.model("opt")
    with pytest.raises(ValueError, match="pads on the right"):
        m(torch.tensor([[7, 8, 9]]), torch.tensor(mask))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_as_long_as_the_positions_last_is_allowed(family):
    m = tiny.model(family)
    ids = torch.full((1, m.config.max_positions), 7)
    assert m(ids, torch.ones_like(ids)).logits.isfinite().all()


def test_too_long_is_refused():
    m = tiny.model("bert")
    ids = torch.full((1, 41), 7)
    with pytest.raises(ValueError, match="41 tokens, the model has positions for 40"):
        m(ids, torch.ones_like(ids))


def test_what_config_json_does_not_decide():
    """Two classes, no dropout, no second norm unless asked for; and a Config stays as it is."""
    c = Config.from_hf(tiny.BERT_CONFIG)
    assert (c.num_labels, c.head, c.dropout, c.shortcut_norm) == (2, "classification", 0.0, "none")
    assert c.eos_token_ids == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.dropout = 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dropout", 1, "dropout is 1, allowed: 0 <= dropout < 1"),
        ("dropout", -0.1, "dropout is -0.1"),
        ("head", "regression", "head is 'regression', allowed: 'classification', 'lm'"),
        ("num_labels", 0, r"num_labels is 0, allowed: 1 \(regression\) or more"),
        ("shortcut_norm", "twice", "shortcut_norm is 'twice', allowed: 'none', 'reuse'"),
        ("num_kv_heads", 2, "num_heads 3 is not a multiple of num_kv_heads 2"),
    ],
)
def test_fields_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(tiny.BERT_CONFIG, **{field: value})


def test_rotary_positions_need_an_even_head():
    assert tiny.config("bert", head_dim=5).head_dim == 5  # a table of positions does not
    with pytest.raises(ValueError, match="head_dim is 5: rotary positions need an even one"):
        tiny.config("llama", head_dim=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not implemented"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish', expected one of relu, gelu"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 13}, "hidden_size 13 is not a multiple of num_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"pad_token_id": 90}, "pad_token_id is 90"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf({**tiny.BERT_CONFIG, **change})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "inverse_layer_idx = True",
        ),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({"model_type": "opt", "enable_bias": False}, "enable_bias = False"),
        (
            {
                **tiny.BERT_CONFIG,
                "model_type": "opt",
                "ffn_dim": 20,
                "activation_function": "swish",
            },
            "activation_function is 'swish'",
        ),
    ],
)
def test_features_of_other_families_are_refused(hf, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(hf)


def test_weights_that_cannot_be_computed_with():
    """A clear word in place of NaN losses, or of a message about devices."""
    batch = tiny.batch(tiny.config("bert"))
    with pytest.raises(ValueError, match="float16"):
        tiny.model("bert", dtype=torch.float16)(**batch)
    with pytest.raises(ValueError, match=r"no weights \(device"):
        tiny.model("bert").to("meta")(**batch)
    assert tiny.model("bert", dtype=torch.bfloat16)(**batch).loss.isfinite()


def test_lm_head_needs_a_causal_family():
    with pytest.raises(ValueError, match="causal family"):
        tiny.config("bert", head="lm")


@pytest.mark.parametrize(("family", "places"), [("bert", 11), ("opt", 9), ("gpt2", 10)])
def test_where_the_backbone_drops_out(family, places, monkeypatch):
    """In 3 blocks attention and both sub-layers; of BERT and GPT-2 embeddings, of BERT the head."""
    m, seen = tiny.model(family, dropout=0.3).train(), []
    attend = model.F.scaled_dot_product_attention

    def attention(*args, dropout_p, **how):
        seen.append((dropout_p, True))
        return attend(*args, **how)

    monkeypatch.setattr(model.F, "dropout", lambda x, p, on: seen.append((p, on)) or x)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", attention)
    m(**tiny.batch(m.config))
    assert seen == [(0.3, True)] * places
