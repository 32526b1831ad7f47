"""Text that a causal model writes: greedy, sampled, or by beam search, with a key-value cache.

    next token   greedy: argmax p     sampled: from softmax(z / temperature), cut to its nucleus
    beams        the num_beams texts of the largest   sum of log p / length^length_penalty
    cache        every block's keys and values of the tokens before: a new token is one query

    name       | symbol | shape
    input_ids  |        | (b, t)   prompts, padded on the right, as the model pads everywhere
    logits     | z      | (b, vocab) of the token that comes next
    tokens     |        | (b,)     one new token a row
    mask       |        | (b, s)   which of the s columns of the cache hold a token

Prompts of unequal length stay padded on the right. The new tokens of every row go into the same
columns behind the longest prompt, while their positions go on from the row's own length; attention
does not ask in which column a key lies, and the mask hides the padding between.

What this file does not do: turn text into tokens (tools/generate.py), call transformers.
"""

import contextlib

import torch

# ------------------------------------------------------------------------------------------- cache


class KeysValues:
    """Of one block, k and v (b, g, columns, d_h), None while it has read nothing.

    An object and no dict: on a GPU a sharded block is called with copies of dicts and lists.
    """

    k = v = None


class Cache:
    """What the model has read so far: keys and values, and how long each row is."""

    def __init__(self, model, mask):
        self.blocks = [KeysValues() for _ in model.layers]
        self.mask = mask  # (b, columns)
        self.lengths = mask.sum(1)  # (b,)

    def reorder(self, rows):
        """Row i becomes what row rows[i] was. rows: (n,); one may repeat, or be left out."""
        for block in self.blocks:
            block.k, block.v = block.k[rows], block.v[rows]  # (len(rows), g, columns, d_h)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]


def read_prompts(model, input_ids, mask):
    """(logits of the first new token (b, vocab), Cache)."""
    cache = Cache(model, mask)
    h = model.encode(model.embed(input_ids), mask, mask.sum(1) - 1, caches=cache.blocks)
    return model.predict(h)[:, 0], cache  # h: (b, 1, embed_dim)


def read_token(model, tokens, cache):
    """Logits of the token after these: (b,) -> (b, vocab). The cache grows by one column."""
    positions = cache.lengths[:, None]  # (b, 1)
    cache.mask = torch.cat([cache.mask, torch.ones_like(cache.mask[:, :1])], 1)
    cache.lengths = cache.lengths + 1
    x = model.embed(tokens[:, None], positions=positions)  # (b, 1, d)
    h = model.encode(x, cache.mask, positions=positions, caches=cache.blocks)
    return model.predict(h)[:, 0]


# ---------------------------------------------------------------------------------------- one text


def choose(logits, temperature, top_p, generator):
    """One token a row, (b, vocab) -> (b,): the likeliest at temperature 0, else a random one."""
    if temperature == 0:
        return logits.argmax(-1)
    # from the largest down, so that the coldest leaves 1 for it and 0 for the others
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # (b, vocab)
    if top_p < 1:
        # The nucleus (arXiv 1904.09751, Eq. 3): the fewest tokens whose probability reaches top_p.
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # of all that are likelier
        p = torch.zeros_like(p).scatter(-1, order, ordered.where(before < top_p, 0.0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def stream(
    model,
    input_ids,
    max_new_tokens,
    attention_mask=None,
    temperature=0.0,
    top_p=1.0,
    generator=None,
    eos_token_ids=None,
):
    """Yields the new tokens of every row as they come, (b,) each; after its end a row has padding.

    Arguments and errors as in `generate`. Between two tokens the model is as the caller left it.
    """
    mask, eos = checked(model, input_ids, max_new_tokens, attention_mask, eos_token_ids)
    if temperature != 0 and not 1e-30 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, allowed: 0 (greedy), or more than 1e-30")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, allowed: 0 < top_p <= 1")
    if temperature == 0 and (top_p < 1 or generator):
        raise ValueError("top_p and generator do nothing at temperature 0: give a temperature")
    return continued(model, input_ids, max_new_tokens, mask, eos, temperature, top_p, generator)


def continued(model, input_ids, max_new_tokens, mask, eos, temperature, top_p, generator):
    """The loop of `stream`, whose arguments are checked."""
    with reading(model):
        logits, cache = read_prompts(model, input_ids, mask)
    ended = torch.zeros_like(mask[:, 0])  # (b,)
    for step in range(max_new_tokens):
        tokens = choose(logits, temperature, top_p, generator)  # (b,)
        tokens = tokens.where(~ended, model.config.pad_token_id)
        yield tokens
        ended = ended | torch.isin(tokens, eos)
        if ended.all() or step == max_new_tokens - 1:
            return
        with reading(model):
            logits = read_token(model, tokens, cache)


# ---------------------------------------------------------------------------------------- generate


def generate(
    model,
    input_ids,
    max_new_tokens,
    attention_mask=None,
    num_beams=1,
    length_penalty=1.0,
    eos_token_ids=None,
    **sampling,
):
    """What the model writes after each prompt.

    Args:
        model: model.Transformer with head "lm".
        input_ids: (b, t) int64, prompts padded on the right.
        max_new_tokens: int, at least 1.
        attention_mask: (b, t), 1 = token, 0 = padding; None = no padding.
        num_beams: int; more than 1: beam search, and no sampling beside it.
        length_penalty: float; beams are compared by sum of log p / length^length_penalty.
        eos_token_ids: where a text ends; None = config.eos_token_ids, () = nowhere.
        sampling: temperature (0 = greedy), top_p and generator, as in `choose`.

    Returns:
        (b, n) int64, the new tokens alone, n <= max_new_tokens; after a row's end, padding.

    Raises:
        ValueError: another head, a setting out of range, or more tokens than the model has
            positions for.
    """
    if num_beams == 1:
        if length_penalty != 1:
            raise ValueError("length_penalty does nothing without beams: give num_beams")
        tokens = stream(
            model,
            input_ids,
            max_new_tokens,
            attention_mask,
            eos_token_ids=eos_token_ids,
            **sampling,
        )
        return torch.stack(list(tokens), 1)  # (b, n)
    vocabulary = model.config.vocab_size
    if type(num_beams) is not int or not 1 < num_beams <= vocabulary // 2:
        raise ValueError(f"num_beams is {num_beams}, allowed: an integer from 1 to vocab_size / 2")
    if not abs(length_penalty) <= 10:
        raise ValueError(f"length_penalty is {length_penalty}, allowed: a number from -10 to 10")
    if sampling:
        raise ValueError(f"{', '.join(sampling)} beside num_beams: beams are not sampled")
    mask, eos = checked(model, input_ids, max_new_tokens, attention_mask, eos_token_ids)
    with reading(model):
        return search(model, input_ids, max_new_tokens, mask, eos, num_beams, length_penalty)


def checked(model, input_ids, max_new_tokens, attention_mask, eos_token_ids):
    """(mask (b, t) bool, eos ids as a tensor). ValueError as in `generate`."""
    c = model.config
    if c.head != "lm":
        raise ValueError(f'the model has the head {c.head!r}: load it with head="lm" to generate')
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, allowed: an integer from 1 up")
    if input_ids.dim() != 2 or not input_ids.numel():
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids is {shape}, expected (b, t) with a token at least")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        shapes = f"{tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask is {shapes}: they are to be alike")
    mask = mask.bool()  # (b, t)
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("attention_mask must be ones, then zeros: this model pads on the right")
    longest = mask.shape[1] + max_new_tokens
    if longest > c.max_positions:
        raise ValueError(
            f"{mask.shape[1]} tokens of prompt and {max_new_tokens} new ones are more than the "
            f"{c.max_positions} positions of the model"
        )
    eos = c.eos_token_ids if eos_token_ids is None else eos_token_ids
    return mask, torch.tensor(eos, dtype=torch.long, device=input_ids.device)


@contextlib.contextmanager
def reading(model):
    """No gradients and no dropout; every module is put back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a sharded base keeps the buffers it gathers in
            yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------- beams


def search(model, input_ids, max_new_tokens, mask, eos, n, length_penalty):
    """The best text of every row, (b, m): beam search as in transformers, early_stopping False.

    In every step the 2 n likeliest continuations of a row's n beams are looked at (more where
    several tokens end a text). Of the first n, those that end are finished; of the others, n go on.
    A row is done when its best running beam, were it to end now, would not be better than the
    worst of n finished texts.
    """
    b, device = len(input_ids), input_ids.device
    logits, cache = read_prompts(model, input_ids, mask)
    cache.reorder(torch.arange(b, device=device).repeat_interleave(n))
    logits = logits.repeat_interleave(n, 0)  # (b n, vocab)
    scores = logits.new_full((b, n), -torch.inf)  # (b, n) sum of log p of the running beams
    scores[:, 0] = 0  # all beams are the prompt: one of them is enough
    texts = input_ids.new_zeros(b, n, 0)  # (b, n, length)
    finished = [[] for _ in range(b)]  # (score, text), the n best of a row, best first
    done = [False] * b
    for length in range(1, max_new_tokens + 1):
        # log p(text) = sum of log p(token | tokens before)
        total = scores[:, :, None] + logits.log_softmax(-1).view(b, n, -1)  # (b, n, vocab)
        width = min(max(2, 1 + len(eos)) * n, total[0].numel())
        total, index = total.flatten(1).topk(width)  # (b, width)
        beam, token = index // logits.shape[1], index % logits.shape[1]  # (b, width)
        texts = torch.cat([texts.gather(1, at(beam, texts)), token[..., None]], -1)
        ends = torch.isin(token, eos) if length < max_new_tokens else torch.ones_like(token).bool()
        for i in range(b):
            candidates = [
                (total[i, j].item() / length**length_penalty, texts[i, j])
                for j in range(n)
                if ends[i, j] and not done[i] and total[i, j] > -torch.inf
            ]
            both = sorted(finished[i] + candidates, key=lambda pair: pair[0], reverse=True)
            finished[i] = both[:n]
        if length == max_new_tokens:
            break
        scores, kept = total.masked_fill(ends, -torch.inf).topk(n)  # (b, n)
        texts, beam = texts.gather(1, at(kept, texts)), beam.gather(1, kept)
        for i in range(b):
            best = scores[i, 0].item() / length**length_penalty
            done[i] |= len(finished[i]) == n and best <= finished[i][-1][0]
        if all(done):
            break
        cache.reorder((beam + n * torch.arange(b, device=device)[:, None]).flatten())
        logits = read_token(model, texts[..., -1].flatten(), cache)  # (b n, vocab)
    best = [row[0][1] for row in finished]
    return torch.nn.utils.rnn.pad_sequence(
        best, batch_first=True, padding_value=model.config.pad_token_id
    )


def at(index, texts):
    """Indices of beams as gather takes them: (b, m) -> (b, m, length)."""
    return index[..., None].expand(-1, -1, texts.shape[-1])
