"""data/describe: form, faithfulness and separation of the embedded text-generation pairs.

A record is {"mr": "kind[library] name[Alder Reading House] …", "references": [two texts]}.
What a machine can check of "says all of the meaning representation and nothing else" is checked
here; whether the English is natural is for a reader.
"""

import collections
import json
import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "describe"
SPLITS = {"train": 300, "dev": 80}  # at least so many records
PAIR = re.compile(r"([a-z ]+)\[([^\[\]]+)\](?: |$)")  # attribute[value]
ATTRIBUTES = [  # in the order in which a meaning representation lists them
    *("kind", "name", "material", "colour", "size", "age"),
    *("maker", "place", "price", "open", "good for"),
]
NUMBERS = re.compile(r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred)\b")
VOWEL_LETTER_NO_VOWEL_SOUND = ("one", "uni", "use")  # "a one litre kettle"
CONSONANT_LETTER_VOWEL_SOUND = ("hour", "honest")


def read(split):
    text = (FOLDER / f"{split}.jsonl").read_text(encoding="ascii")
    return [json.loads(line) for line in text.splitlines()]


def parse(mr):
    """The (attribute, value) pairs of a meaning representation, in their order."""
    return PAIR.findall(mr)


def structure(mr, reference):
    """The reference with each value replaced by <attribute>, and the attributes not found.

    The name goes first and everywhere, then longer values before shorter ones, each once: "white"
    in "White Heron" does not count as the colour, nor "bridge" in "Toll House Bridge" as the kind.
    """
    pairs, missing = dict(parse(mr)), []
    for attribute in sorted(pairs, key=lambda a: (a != "name", -len(pairs[a]))):
        value = re.compile(rf"(?<![\w<]){re.escape(pairs[attribute])}(?![\w>])", re.IGNORECASE)
        reference, times = value.subn(
            f"<{attribute}>", reference, count=0 if attribute == "name" else 1
        )
        if times == 0:
            missing.append(attribute)
    return reference, missing


def each_reference(split):
    for record in read(split):
        for reference in record["references"]:
            yield record["mr"], reference


@pytest.mark.parametrize("split", SPLITS)
def test_every_record_has_the_promised_form(split):
    records = read(split)
    assert len(records) >= SPLITS[split]
    for record in records:
        assert list(record) == ["mr", "references"] and len(record["references"]) == 2
        pairs = parse(record["mr"])
        assert " ".join(f"{a}[{v}]" for a, v in pairs) == record["mr"]
        names = [attribute for attribute, _ in pairs]
        assert names[:2] == ["kind", "name"] and 4 <= len(names) <= 6, record["mr"]
        assert names == [a for a in ATTRIBUTES if a in names], record["mr"]
        assert all(value == value.strip() for _, value in pairs)


@pytest.mark.parametrize("split", SPLITS)
def test_both_references_say_every_value(split):
    """Literally, but for case: no inflected form is needed anywhere."""
    assert [(r, m) for mr, r in each_reference(split) if (m := structure(mr, r)[1])] == []


@pytest.mark.parametrize("split", SPLITS)
def test_references_name_and_number_nothing_else(split):
    """Outside the values there is no digit, no number word, no capital but a sentence's first."""
    for mr, reference in each_reference(split):
        rest = re.sub(r"(^|[.?] )([A-Z])", lambda m: m[0].lower(), structure(mr, reference)[0])
        assert not re.search(r"[A-Z0-9]", rest), reference
        assert not NUMBERS.search(rest), reference  # "one" is not among them: it is a pronoun too


@pytest.mark.parametrize("split", SPLITS)
def test_references_are_one_or_two_clean_sentences(split):
    for _, reference in each_reference(split):
        assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9 ,.;:?'-]*[.?]", reference), reference
        assert 1 <= len(re.findall(r"[.?](?: |$)", reference)) <= 2, reference
        assert not re.search(r"  | [,.;:?]|\b(\w+) \1\b", reference, re.IGNORECASE), reference


@pytest.mark.parametrize("split", SPLITS)
def test_articles_agree_with_the_next_word(split):
    for _, reference in each_reference(split):
        for article, word in re.findall(r"\b(an?) ([\w-]+)", reference, re.IGNORECASE):
            word = word.lower()
            vowel = word[0] in "aeiou" and not word.startswith(VOWEL_LETTER_NO_VOWEL_SOUND)
            vowel = vowel or word.startswith(CONSONANT_LETTER_VOWEL_SOUND)
            vowel = vowel or re.match(r"8|1[18]\b", word) is not None
            assert (article.lower() == "an") == vowel, reference


@pytest.mark.parametrize("split", SPLITS)
def test_no_two_references_share_a_structure(split):
    """With the values taken out, all references differ: there is no template behind them."""
    count = collections.Counter(structure(*pair)[0] for pair in each_reference(split))
    assert [text for text, times in count.items() if times > 1] == []


def test_no_meaning_or_name_or_text_occurs_twice():
    records = read("train") + read("dev")
    for values in (
        [record["mr"] for record in records],
        [dict(parse(record["mr"]))["name"].lower() for record in records],
        [reference for record in records for reference in record["references"]],
    ):
        assert [v for v, times in collections.Counter(values).items() if times > 1] == []


def test_dev_is_about_other_subjects_in_the_same_terms():
    """No kind, and no word of a name but small ones, is shared; every attribute of dev is in train.

    Stronger for kinds: a kind of one split is not mentioned at all in the other's texts.
    """
    train, dev = ([dict(parse(r["mr"])) for r in read(split)] for split in SPLITS)
    small = {"a", "and", "in", "is", "of", "on", "s", "the"}

    def name_words(records):
        return {w for r in records for w in re.findall(r"[a-z]+", r["name"].lower())} - small

    assert name_words(train) & name_words(dev) == set()
    assert {a for r in dev for a in r} <= {a for r in train for a in r}
    for kinds, other in ((train, "dev"), (dev, "train")):
        text = "\n".join(f"{mr} {reference}" for mr, reference in each_reference(other)).lower()
        for kind in {r["kind"] for r in kinds}:
            assert not re.search(rf"\b{kind}\b", text), (kind, other)


def test_size_is_below_200_kilobytes():
    assert sum((FOLDER / f"{split}.jsonl").stat().st_size for split in SPLITS) < 200_000
