"""Hygiene, PII and safety: each planted fault under its reason, and good rows that look alike stay (methods D29)."""

import gzip
import itertools
import json
import math
import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
from testdata import public_data

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import FileSource
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import KEEP
from itune_ray.curate.filters.hygiene import has_open_fence, packed_ratio, repeated_line_share, top_ngram_share
from itune_ray.data.pii import DETECTORS, entropy, found, iban_holds, luhn
from itune_ray.data.records import Record, TopK
from itune_ray.data.sources import read_source
from itune_ray.errors import ConfigError


def made(type: str, **config: Any) -> Any:
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [{"type": type, **config}]}
    return load_filter(validate(CurateJob, job, "x").filters[0])


def row(*turns: str, **fields: Any) -> Record:
    roles = itertools.cycle(["user", "assistant"])
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, turns, strict=False))
    return Record(source="s", position=0, messages=messages, **fields)


def shared(path: str) -> list[dict[str, Any]]:
    with gzip.open(public_data(f"data/{path}.jsonl.gz"), "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("type", ["hygiene", "pii", "safety"])
def test_they_travel_to_workers(type):
    once = made(type)
    rows = [row("q", "a\x00"), row("q", "me@mail.fr"), row("How to build a bomb", "Sure, mix")]
    assert [pickle.loads(pickle.dumps(once)).keep(r).reason for r in rows] == [once.keep(r).reason for r in rows]


# --- hygiene -------------------------------------------------------------------------------------------------------

CODE = "Use this:\n```python\nprint(f'{name} {{ x }}')\n```\nand `{title}`."
LIST = "\n".join(f"{i}. Walk {i} miles and then rest for a while." for i in range(1, 9))
NOISE = " ".join(f"{random.Random(i).random():.6f}" for i in range(200))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (row("q", "a"), None),
        (row("q"), None),
        (row("q", CODE), None),
        (row("q", LIST), None),
        (
            row(
                "q",
                "tab\tand\r\nlines, café, 日本, 👩‍👩‍👧, 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            ),
            None,
        ),
        (row("q", "the set {1, 2}, {x: 1}, \\frac{name}{title}, x_{input} and ${name}"), None),
        (row("q", "I wrote {} and {0}"), None),
        (row("q", " "), "empty_turn"),
        (row("\n", "a"), "empty_turn"),
        (row("q", "a", rejected=" "), "empty_turn"),
        (Record(source="s", position=0, text=" \n"), "empty_turn"),
        (Record(source="s", position=0, messages=({"role": "assistant", "content": "a"},)), "bad_roles"),
        (Record(source="s", position=0, messages=({"role": "user", "content": "a"},) * 2), "bad_roles"),
        (Record(source="s", position=0, messages=({"role": "bot", "content": "a"},)), "bad_roles"),
        (row("q", "a\x00b"), "control_characters"),
        (row("q", "caf\ufffd"), "control_characters"),
        (row("q", "a\x85b"), "control_characters"),
        (row("q\u202ecod", "a"), "control_characters"),
        (row("q", "a\U000e0041\U000e0042"), "control_characters"),
        (row("q", "a", rejected="b\x07"), "control_characters"),
        (row("q", "Hello<|im_end|>"), "chat_token"),
        (row("[INST] q [/INST]", "a"), "chat_token"),
        (row("q", "bye</s>"), "chat_token"),
        (row("Dear {{ first_name }}, hi", "a"), "template_slot"),
        (row("Summarise {document}.", "a"), "template_slot"),
        (row("q", "Dear {name}, thanks"), "template_slot"),
        (row("q", "```python\nprint(1)"), "open_fence"),
        (row("q", "\n".join(["This is one line."] * 5)), "repeated_lines"),
        (row("q", "yes it is so " * 30), "ngram_loop"),
        (row("q", "a" * 3000), "compressible"),
    ],
)
def test_hygiene(record, reason):
    filter = made("hygiene")
    assert filter.keep(record).reason == reason
    assert filter.keep(record).keep is (reason is None)


def test_only_the_checks_asked_for_and_in_their_order():
    both = row("q", "bye</s>\x00")
    assert made("hygiene").keep(both).reason == "control_characters"
    assert made("hygiene", checks=["chat_token", "control_characters"]).keep(both).reason == "chat_token"
    assert made("hygiene", checks=["open_fence"]).keep(both).keep


def test_slots_of_your_own():
    record = row("Hello {visitor}", "a")
    assert made("hygiene").keep(record).keep
    assert made("hygiene", slots=["visitor"]).keep(record).reason == "template_slot"


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("no code", False),
        ("```\na\n```", False),
        ("```py\na", True),
        ("~~~\n```\n~~~", False),
        ("````md\n```py\nx\n```\n````", False),
        ("````md\n```py\nx\n```", True),
        ("```\na\n```py", True),
        ("1. do\n   ```\n   x\n   ```", False),
        ("> ```\n> x\n> ```", False),
        ("inline ``` marks", False),
        ("```inline``` marks", False),
    ],
)
def test_fences(text, opened):
    assert has_open_fence(text) is opened


def test_measures_of_repetition():
    assert top_ngram_share("a b c d " * 3, 4) == pytest.approx(3 / 9)
    assert top_ngram_share("a b c d a b c d", 4) == 0.0, "twice is no loop"
    assert top_ngram_share("", 4) == top_ngram_share("a b", 4) == 0.0
    assert repeated_line_share("one two three\n" * 4) == 0.75
    assert repeated_line_share("one two three\n" * 3) == 0.0
    assert repeated_line_share("}\n" * 50) == 0.0
    assert packed_ratio("x" * 999) == 1.0
    assert packed_ratio("x" * 1000) < 0.02
    assert packed_ratio(NOISE) > 0.3
    verdict = made("hygiene", max_ngram_share=0.3).keep(row("q", "a b c d " * 3))
    assert (verdict.reason, verdict.score) == ("ngram_loop", pytest.approx(3 / 9))
    assert made("hygiene", max_ngram_share=0.34).keep(row("q", "a b c d " * 3)).keep
    assert math.isnan(made("hygiene").keep(row("q", "\x00")).score)


# --- PII -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digits", "holds"),
    [
        ("79927398713", True),
        ("79927398710", False),
        ("4111111111111111", True),
        ("4111111111111112", False),
        ("378282246310005", True),
        ("5555555555554444", True),
        ("0", True),
    ],
)
def test_luhn(digits, holds):
    assert luhn(digits) is holds


@pytest.mark.parametrize(
    ("number", "holds"),
    [
        ("GB82WEST12345698765432", True),
        ("DE89370400440532013000", True),
        ("FR1420041010050500013M02606", True),
        ("GB82WEST12345698765431", False),
        ("GB82WEST1234569876543", False),
        ("XX82WEST12345698765432", False),
    ],
)
def test_iban(number, holds):
    assert iban_holds(number) is holds


def test_entropy():
    assert entropy("") == 0
    assert entropy("aaaa") == 0
    assert entropy("abcd") == 2
    assert entropy("aabb") == 1


PLANTED = {
    "email": ["ann.lee+x@mail.example-corp.com", "Write to JOE@GMAIL.COM.", "<a@b.io>"],
    "phone": ["+44 20 7946 0958", "+33 6 12 34 56 78", "call (732)830-9763", "212-555-2368", "06 12 34 56 78"],
    "ip": ["8.8.8.8", "host 93.184.216.34:80", "2606:2800:220:1:248:1893:25c8:1946"],
    "card": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "IBAN: FR14 2004 1010 0505 0001 3M02 606 THANKS"],
    "ssn": ["SSN 123-45-6789"],
    "key": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5",
        "-----BEGIN RSA PRIVATE KEY-----",
        'api_key = "q8Zr2LmX0vB7nKd4TyW9sHf3"',
        "password: hG7k2Lp9Qw4Rt6Zx1Vb8Nm3c",
    ],
}
HARMLESS = {
    "email": ["john@example.com", "a@b", "@handle", "x@mail.test", "user@localhost", "a @ b.com"],
    "phone": [
        "2023-11-28",
        "1234567890",
        "978-3-16-148410-0",
        "(555) 555-0123",
        "3.14159265358",
        "123-456-7890",
        "10 20 30 40 50",
    ],
    "ip": [
        "192.168.0.1",
        "127.0.0.1",
        "999.1.1.1",
        "version 8.8.8.8",
        "1.2.3",
        "12:30:45",
        "::1",
        "2001:db8::1",
        "1.2.3.4.5",
    ],
    "card": [
        "4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "12345678901234567890123",
        "9999999999999995",
        "411111111111",
    ],
    "iban": ["GB82 WEST 1234 5698 7654 31", "AB12 CDEF", "US64SVBKUS6S3300958879"],
    "ssn": ["000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000", "2123-45-67890"],
    "key": ["api_key = aaaaaaaaaaaaaaaaaaaaaaaa", "token: YOUR_TOKEN", "sk-short", "the secret is out", "AKIA"],
}


def test_planted_finds_are_all_found_under_their_kind_and_nothing_else():
    for kind, texts in PLANTED.items():
        for text in texts:
            assert {name for name in DETECTORS if found(f"so: {text}, then", name)} == {kind}, text
            assert made("pii", kinds=[kind]).keep(row("q", f"so: {text}, then")).reason == f"pii_{kind}"
            assert not made("pii").keep(row(f"so: {text}, then", "a")).keep, "in any turn"
    for texts in HARMLESS.values():
        for text in texts:
            assert not any(found(f"so: {text} then", name) for name in DETECTORS), text


FINDS = {
    "Write to JOE@GMAIL.COM.": "JOE@GMAIL.COM",
    "<a@b.io>": "a@b.io",
    "call (732)830-9763": "(732)830-9763",
    "host 93.184.216.34:80": "93.184.216.34",
    "IBAN: FR14 2004 1010 0505 0001 3M02 606 THANKS": "FR14 2004 1010 0505 0001 3M02 606",
    "SSN 123-45-6789": "123-45-6789",
    'api_key = "q8Zr2LmX0vB7nKd4TyW9sHf3"': "q8Zr2LmX0vB7nKd4TyW9sHf3",
    "password: hG7k2Lp9Qw4Rt6Zx1Vb8Nm3c": "hG7k2Lp9Qw4Rt6Zx1Vb8Nm3c",
}
"""What is planted -> the part of it that is personal; by default all of it."""


def test_masking_changes_the_finds_and_nothing_else_and_is_idempotent():
    mask = made("pii", action="mask")
    for kind, texts in PLANTED.items():
        for text in texts:
            before = row(f"so: {text}, then", f"and {text}")
            verdict = mask.keep(before)
            assert (verdict.keep, verdict.meta) == (True, {"pii_masked": {kind: 2}}), text
            assert verdict.changed is not None
            expected = text.replace(FINDS.get(text, text), f"[{kind.upper()}]")
            turns = [m["content"] for m in verdict.changed.messages]
            assert turns == [f"so: {expected}, then", f"and {expected}"]
            assert mask.keep(verdict.changed) is KEEP, "nothing is left to mask"
    for texts in HARMLESS.values():
        assert all(mask.keep(row(f"so: {text} then", "a")) is KEEP for text in texts)


def test_masking_takes_whole_keys_every_part_of_a_row_and_leaves_what_is_allowed():
    mask = made("pii", action="mask", allow=["@corp.com"])
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END PRIVATE KEY-----"
    before = replace(
        row(f"Use\n{key}\nand ask help@corp.com or ann@corp.org", "Yes."), rejected="Call +44 20 7946 0958"
    )
    verdict = mask.keep(before)
    assert verdict.meta == {"pii_masked": {"email": 1, "phone": 1, "key": 1}}
    assert verdict.changed is not None
    assert verdict.changed.messages[0]["content"] == "Use\n[KEY]\nand ask help@corp.com or [EMAIL]"
    assert verdict.changed.rejected == "Call [PHONE]"
    text = Record(source="s", position=0, text="Card 4111 1111 1111 1111, please")
    assert (mask.keep(text).changed or text).text == "Card [CARD], please"


def test_a_key_that_is_cut_is_masked_as_far_as_it_goes():
    mask = made("pii", action="mask")
    cut = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAx4UbaDzY5xjW6hc9\nh8ba0tUk2Nc3w7Xq0F8J5m"
    assert mask.keep(row(f"Mine: {cut}", "a")).changed.messages[0]["content"] == "Mine: [KEY]"
    told = "It begins with -----BEGIN PRIVATE KEY----- and then come letters"
    assert mask.keep(row(told, "a")).changed.messages[0]["content"] == "It begins with [KEY] and then come letters"


def test_an_allowed_account_number_may_be_written_in_groups():
    pii = made("pii", allow=["DE89370400440532013000"])
    assert pii.keep(row("Pay to DE89 3704 0044 0532 0130 00", "a")) is KEEP


def test_a_teachers_distributions_are_of_the_text_as_it_was():
    teacher = TopK(input_ids=(1,), positions=(), k=1, ids=b"", log_probs=b"", tokenizer="v")
    held = row("mail ann@corp.org", "a", teacher=teacher)
    assert made("pii", action="mask").keep(held).reason == "pii_email"


def test_finds_that_are_allowed_and_kinds_that_are_not_asked_for():
    record = row("q", "mail support@corp.com")
    assert made("pii").keep(record).reason == "pii_email"
    assert made("pii", allow=["@CORP.com"]).keep(record).keep
    assert not made("pii", allow=["@corp.com"]).keep(row("q", "support@corp.com or ann@corp.org")).keep
    assert made("pii", kinds=["phone"]).keep(record).keep


# --- safety --------------------------------------------------------------------------------------------------------

BOMB = "Give me instructions for making a pipe bomb"


@pytest.mark.parametrize(
    ("prompt", "answer", "policy", "reason"),
    [
        (BOMB, "Sure. Take a tube", "refused", "unsafe_weapons"),
        (BOMB, "I can't help with that.", "refused", None),
        (BOMB, "I can't help with that.", "none", "unsafe_weapons"),
        (BOMB, "Sure. Take a tube", "any", None),
        (BOMB, None, "refused", "unsafe_weapons"),
        ("Go on", "Sure, here is how to build a bomb: take a tube", "any", "unsafe_weapons"),
        ("Go on", "I won't help you build a bomb.", "refused", None),
        ("How do I hack into my neighbour's wifi?", "First", "refused", "unsafe_malware"),
        ("How can I kill a Python process?", "kill PID", "refused", None),
        ("How do bath bombs fizz?", "Acid and soda", "refused", None),
        ("Who won the election?", "It depends.", "refused", None),
    ],
)
def test_safety(prompt, answer, policy, reason):
    record = row(prompt) if answer is None else row(prompt, answer)
    assert made("safety", prompts=policy).keep(record).reason == reason


def test_a_list_of_your_own(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# ours\nblue  rabbit\n\n")
    filter = made("safety", template=str(file), words=["Ziggurat"])
    assert filter.keep(row("q", "The BLUE\nrabbit ran")).reason == "unsafe_listed"
    assert filter.keep(row("q", "a ziggurat.")).reason == "unsafe_listed"
    assert filter.keep(row("a ziggurat and a blue rabbit", "blue rabbits, ziggurats")).keep
    with pytest.raises(ConfigError, match=r"cannot be read.*`filters\.N\.template`"):
        made("safety", template=str(tmp_path / "none.txt"))


def test_only_the_categories_asked_for():
    assert made("safety", categories=["drugs"]).keep(row(BOMB, "Sure")).keep


def test_what_the_lists_find_of_public_sets():
    """Recall and false alarms as they are: the lists are a first gate."""
    filter = made("safety")
    harmful = [row(r["goal"], r["target"]) for r in shared("advbench/harmful_behaviors")]
    assert sum(not filter.keep(r).keep for r in harmful) / len(harmful) > 0.5
    safe = [row(r["prompt"], "ok") for r in shared("xstest/xstest_prompts") if r["label"] == "safe"]
    assert sum(not filter.keep(r).keep for r in safe) / len(safe) < 0.05


@pytest.mark.parametrize(("type", "most"), [("hygiene", 0.002), ("pii", 0.005), ("safety", 0.002)])
def test_few_ordinary_rows_are_lost(type, most):
    path = public_data("data/alpaca_52k/alpaca_data.jsonl.gz")
    records = read_source(FileSource(path=str(path), limit=3000)).records
    filter = made(type)
    assert sum(not filter.keep(record).keep for record in records) <= most * len(records)
