"""What a causal model writes after the prompts of a split, and how near it comes to the references.

    bleu                     sacrebleu, in lower case: equal to the official script of E2E
    meteor, rouge_l, cider   pycocoevalcap, with its Java programs, where both are there

No metric is computed here: each is another program's.

    name      | what it is
    prompts   | list of texts.Prompt
    written   | list of str, what the model wrote after each of them

What this file does not do: choose tokens (generation.py), decide when (evaluation.py).
"""

import contextlib
import io
import shutil

import torch

from support import distributed, glue, large, terminal
from support.errors import one_line

BATCH = 48  # prompts that are answered side by side
EXAMPLES = 3  # that are printed


def write(model, tokenizer, prompts):
    """The greedy answer to every prompt, in order; by all processes together.

    An answer ends where the model ends it, or at the length of the longest reference of all.
    """
    longest = max(prompt.longest for prompt in prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    # A sharded model is called equally often by all: then each process answers every prompt.
    mine = order if large.is_sharded(model) else distributed.share(order)
    found = {}
    for indices in terminal.watched(glue.in_order(mine, BATCH), "writing"):
        chosen = [mine[i] for i in indices]
        answers = answer(model, [prompts[i].ids for i in chosen], longest)
        found |= {i: tokenizer.decode(a).strip() for i, a in zip(chosen, answers, strict=True)}
    parts = {i: text for part in distributed.gather(found) for i, text in part.items()}
    return [parts[i] for i in range(len(prompts))]


def answer(model, asked, longest):
    """Greedy tokens after each list of ids, without the end of text."""
    config, device = model.config, model.word_embeddings.weight.device
    t = max(map(len, asked))
    if t + longest > config.max_positions and len(asked) > 1:  # each has the room of its own length
        for one in asked:
            yield from answer(model, [one], longest)
        return
    ids = torch.tensor([a + [config.pad_token_id] * (t - len(a)) for a in asked], device=device)
    mask = torch.tensor([[1] * len(a) + [0] * (t - len(a)) for a in asked], device=device)
    room = min(longest, config.max_positions - t)
    for row in model.generate(ids, room, attention_mask=mask).tolist():
        end = next((i for i, token in enumerate(row) if token in config.eos_token_ids), len(row))
        yield row[:end]


def bleu(prompts, written):
    """BLEU of all that was written, 0 to 100, each text against all references of its prompt."""
    import sacrebleu

    most = max(len(prompt.references) for prompt in prompts)
    streams = [  # the i-th reference of every prompt, None where it has fewer
        [p.references[i] if i < len(p.references) else None for p in prompts] for i in range(most)
    ]
    return sacrebleu.corpus_bleu(written, streams, lowercase=True).score


def with_java(prompts, written):
    """(METEOR, ROUGE-L and CIDEr, "") by pycocoevalcap and its tokeniser; or ({}, why not)."""
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        return {}, "METEOR, ROUGE-L and CIDEr need pip install pycocoevalcap: left out"
    if not shutil.which("java"):
        return {}, "METEOR, ROUGE-L and CIDEr need Java: left out"
    references = {i: [{"caption": text} for text in p.references] for i, p in enumerate(prompts)}
    texts = {i: [{"caption": text}] for i, text in enumerate(written)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it counts its words aloud
            both = [PTBTokenizer().tokenize(part) for part in (references, texts)]
            scorers = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}
            scores = {name: float(s.compute_score(*both)[0]) for name, s in scorers.items()}
    except Exception as error:  # of another program, after all the training
        return {}, f"METEOR, ROUGE-L and CIDEr failed ({one_line(error)}): left out"
    return {name: s if name == "cider" else 100 * s for name, s in scores.items()}, ""


def beside_references(prompts, written):
    """A few prompts, spread over the split, with what was written and the references: lines."""
    step, lines = max(1, (len(prompts) - 1) // (EXAMPLES - 1)), []
    for i in range(0, len(prompts), step)[:EXAMPLES]:
        lines += ["", f"prompt      {one_line(prompts[i].text)}"]
        lines += [f"written     {one_line(written[i])}"]
        lines += [f"reference   {one_line(text)}" for text in prompts[i].references[:2]]
    return "\n".join(lines[1:])
