"""How a model is asked: its chat template, and the tokens of a prompt.

    form       | a chat template and its special tokens by their names, (str, dict); or None
    specials   | what the template calls bos_token, eos_token, pad_token, unk_token
    ends       | ids of the tokens that end a text; a target is trained to end with the first

A chat template is a Jinja program that comes with the model. It runs in Jinja's sandbox, which lets
it make text and nothing else; jinja2 comes with torch.

What this file does not do: know tasks (texts.py), choose tokens (generation.py).
"""

import datetime
import json

from support import hf_folder
from support.errors import one_line, shown

TODAY = datetime.datetime(2024, 7, 26)  # what templates that ask for the day say by themselves


def read_form(folder):
    """The form of a model folder, None where it has no chat template; its specials either way."""
    template, options = hf_folder.read_chat_template(folder)
    specials = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = options.get(key) or ""
        specials[key] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(specials[key], str):
            raise ValueError(f"{folder}: {key} is {shown(token)}, no token")
    return (template, specials) if template else None, specials


def render(template, prompt, specials):
    """The prompt as the model's chat template puts it, up to where the answer begins.

    What transformers gives to a template, and no tools or documents. deviates: today is always
    TODAY, for a prompt should not depend on the day on which a run goes on.

    Raises:
        ValueError: the template is no Jinja, or does not take a single message of a user.
    """
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    class Generation(Extension):
        """{% generation %} marks what an assistant wrote; here it is there and marks nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
    messages = [{"role": "user", "content": prompt}]
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **specials
        )
    except Exception as error:  # Jinja's, or any that the template's own program raises
        raise ValueError(f"the chat template fails: {one_line(error)}") from error


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers' templates have it: characters as they are, keys in their order."""
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def ends_of(tokenizer, eos_token_ids, specials):
    """The tokens that end a text, the one that the chat template ends an answer with first."""
    own = tokenizer.token_to_id(specials.get("eos_token") or "")
    return sorted(eos_token_ids, key=lambda token: token != own)  # stable: else as config.json has


def ids_of(tokenizer, prompt, form, ends):
    """The tokens of a prompt, up to where the answer begins.

    Args:
        tokenizer: tokenizers.Tokenizer; the special tokens that it puts before a text are kept, an
            end of text behind it is not.
        prompt: str. form: as in the table above; with it the template has the special tokens in it.
        ends: list of ids.
    """
    if form:
        return tokenizer.encode(render(form[0], prompt, form[1]), add_special_tokens=False).ids
    ids = tokenizer.encode(prompt).ids
    return ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids
