"""model.py against transformers: logits, loss and gradients on the same weights, and token ids."""

import pytest
import torch
import transformers

import lora
import tiny
from model import load_pretrained
from peer_models import write_tokenizer
from support import download, glue, hf_folder

CASES = [(f, "classification") for f in tiny.FAMILIES] + [
    ("opt", "lm"),
    ("opt-350m", "lm"),
    ("gpt2", "lm"),
]
SHAPES = [(9, 4, 6), (5,), (7, 7), (2, 31, 1 + 1)]


def peer_gradient(peer, family, name):
    """The gradient of transformers' weight that is our `name`, as (out, in)."""
    module = hf_folder.hf_module(family, name)
    parameters = dict(peer.named_parameters())
    (full,) = [n for n in parameters if n.endswith(f"{module}.weight")]
    gradient = parameters[full].grad
    if family != "gpt2":
        return gradient
    place = name.rpartition(".")[2]
    chunks = gradient.chunk(3, dim=1) if "c_attn" in module else [gradient]
    return chunks[("q_proj", "k_proj", "v_proj").index(place) if len(chunks) == 3 else 0].T


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize(("family", "head"), CASES)
def test_logits_loss_and_gradients(pair, family, head, lengths):
    peer, ours = pair(family, head)
    batch = tiny.batch(ours.config, lengths=lengths)
    expected, got = peer(**batch), ours(**batch)
    real = batch["attention_mask"].bool() if head == "lm" else slice(None)
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=1e-10)
    loss = expected.loss
    if head == "lm":  # transformers computes this loss in float32, whatever the model's dtype
        torch.testing.assert_close(got.loss.float(), loss, rtol=1e-5, atol=1e-5)
        shifted = torch.cat(
            [torch.full_like(real[:, :1], False), real[:, 1:]], 1
        )  # has a predecessor
        chosen = expected.logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])
        loss = -chosen[..., 0][shifted[:, 1:]].mean()
    torch.testing.assert_close(got.loss, loss, rtol=0, atol=1e-10)
    loss.backward()
    got.loss.backward()
    for i, block in enumerate(ours.layers):
        for place in [p for p in lora.LINEARS if p != "gate_proj"]:
            theirs = peer_gradient(peer, ours.config.family, f"layers.{i}.{place}")
            gradient = getattr(block, place).weight.grad
            torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float32(pair, family):
    peer, ours = pair(family, dtype=torch.float32)
    batch = tiny.batch(ours.config)
    torch.testing.assert_close(ours(**batch).logits, peer(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_regression(pair, family):
    peer, ours = pair(family, num_labels=1)
    batch = tiny.batch(ours.config)
    batch["labels"] = batch["labels"].double()
    torch.testing.assert_close(ours(**batch).loss, peer(**batch).loss, rtol=0, atol=1e-10)


def test_minilm_on_its_real_weights():
    folder = download.model_folder("minilm")
    ours, tokenizer = load_pretrained("minilm", num_labels=2)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        peer.classifier.weight.copy_(ours.classifier.weight)
        peer.classifier.bias.copy_(ours.classifier.bias)
    train, _ = glue.load_task("paraphrase")
    encoded, _ = glue.encode(train[:16], tokenizer, 128)
    batch = glue.collate(encoded, 0, True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        got, expected = ours.to(dtype)(**batch), peer.to(dtype)(**batch)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=tolerance)
        torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=tolerance)


TEXTS = [
    ("the cat", "a dog that barks"),
    ("a b c d e f g h i j k l m n o p", "that"),
    ("that", "a b c d e f g h i j k l m n o p"),
    ("a, b? the 'end'", "the  the   that!"),
    ("", "a"),
]


@pytest.mark.parametrize("max_length", [12, 13, 40])
@pytest.mark.parametrize("family", ["bert", "roberta", "opt", "gpt2"])
def test_pairs_are_encoded_token_for_token(tmp_path, family, max_length):
    """Special tokens, types and truncation, on the files that both read."""
    write_tokenizer(tmp_path, family)
    ours = hf_folder.load_tokenizer(tmp_path, family, 90)
    if family == "bert":
        peer = transformers.BertTokenizer.from_pretrained(tmp_path)
    elif family == "roberta":
        peer = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    else:  # transformers' class for OPT is GPT-2's, with </s> put before each text
        opt = family == "opt"
        end = "</s>" if opt else "<|endoftext|>"
        peer = transformers.GPT2Tokenizer.from_pretrained(
            tmp_path, bos_token=end, eos_token=end, unk_token=end, add_bos_token=opt
        )
    encoded, _ = glue.encode([(texts, 0) for texts in TEXTS], ours, max_length)
    for texts, example in zip(TEXTS, encoded, strict=True):
        expected = peer(*texts, truncation="longest_first", max_length=max_length)
        assert example["input_ids"] == expected["input_ids"]
        if family == "bert":
            assert example["token_type_ids"] == expected["token_type_ids"]


def test_minilm_tokens_on_real_text():
    folder = download.model_folder("minilm")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    train, dev = glue.load_task("paraphrase")
    ours = hf_folder.load_tokenizer(folder, "bert", 30522)
    encoded, cut = glue.encode(train + dev, ours, 24)
    assert cut > 100  # some are long enough to be truncated
    for (texts, _), example in zip(train + dev, encoded, strict=True):
        expected = peer(*texts, truncation="longest_first", max_length=24)
        assert example["input_ids"] == expected["input_ids"]
        assert example["token_type_ids"] == expected["token_type_ids"]
