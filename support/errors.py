"""The words of others in our messages: always one line, of a length that can be read.

What this file does not do: print, or raise.
"""

LIMIT = 300  # characters


def one_line(text, limit=LIMIT):
    """Any text or exception as one line, without control characters.

    Every kind of white space becomes one space, so no line break of any alphabet is left (CR alone,
    form feed, U+2028, …); what cannot be printed becomes its escape, so that a file's name or
    content cannot move the cursor. What is longer than the limit ends in "…".

    Args:
        text: str, or any object; an exception without a text is called by its type.
        limit: int, the longest result in characters.
    """
    said = str(text)
    if not said.strip() and isinstance(text, BaseException):
        said = type(text).__name__
    said = " ".join(said[: 20 * limit].split())
    said = "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)
    return said if len(said) <= limit else said[: limit - 1] + "…"


def shown(value, limit=80):
    """repr(value) on one line: a value out of a file, quoted in a message."""
    try:
        return one_line(repr(value), limit)
    except RecursionError:  # lists in lists in lists
        return f"a {type(value).__name__}"
