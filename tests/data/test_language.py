"""Scripts are exact, languages are told or undetermined (methods D41)."""

import gzip
import json
from collections import Counter
from typing import Any

import pytest
from testdata import public_data

from itune_ray.data.language import (
    LANGUAGES,
    TWO_LETTERS,
    UNDETERMINED,
    detect,
    main_script,
    script_counts,
    script_of,
)

LETTERS = {
    "Latn": "aZéßøłșđÿａ",
    "Grek": "αΩάϊ",
    "Cyrl": "яЖїђґ",
    "Armn": "աՖ",
    "Hebr": "את",
    "Arab": "عپڈ",
    "Syrc": "ܐ",
    "Thaa": "ހ",
    "Deva": "कह",
    "Beng": "কখ",
    "Guru": "ਕ",
    "Gujr": "ક",
    "Orya": "କ",
    "Taml": "தழ",
    "Telu": "త",
    "Knda": "ಕ",
    "Mlym": "ക",
    "Sinh": "ක",
    "Thai": "กฮ",
    "Laoo": "ກ",
    "Tibt": "ཀ",
    "Mymr": "က",
    "Geor": "აჰ",
    "Ethi": "ሀ",
    "Cher": "Ꭰ",
    "Khmr": "ក",
    "Mong": "ᠠ",
    "Hira": "あん",
    "Kana": "アｱ",
    "Hani": "漢字々㐀"[:2],
    "Bopo": "ㄅ",
    "Hang": "한ㄱ",
    "Copt": "ⲁ",
}


@pytest.mark.parametrize(("script", "letters"), LETTERS.items())
def test_each_letter_has_its_script(script, letters):
    assert [script_of(letter) for letter in letters] == [script] * len(letters)
    assert script_counts(letters * 3) == {script: 3 * len(letters)}


@pytest.mark.parametrize("sign", "1٣!? \n😀́_µª")
def test_what_is_no_letter_or_of_no_script_counts_for_none(sign):
    assert script_of(sign) is None


def test_the_main_script_of_mixed_texts():
    assert main_script(script_counts("東京に行きました")) == "Jpan"
    assert main_script(script_counts("我去了东京")) == "Hani"
    assert main_script(script_counts("ab 日本")) == "Hani"
    assert main_script(script_counts("abc 日本")) == "Latn"
    assert main_script(script_counts("123 !")) == "Zyyy"
    counts = script_counts("Привет, world 世界")
    assert sum(counts.values()) == 13


TEXTS = {
    "eng": "The house that we saw was on the other side of the river.",
    "fra": "La maison que nous avons vue était de l'autre côté de la rivière.",
    "deu": "Das Haus, das wir gesehen haben, war auf der anderen Seite des Flusses.",
    "spa": "La casa que vimos estaba en el otro lado del río.",
    "ita": "La casa che abbiamo visto era dall'altra parte del fiume, ma non è la nostra.",
    "por": "A casa que vimos estava do outro lado do rio, mas não é a nossa.",
    "nld": "Het huis dat wij zagen was aan de andere kant van de rivier.",
    "swe": "Huset som vi såg var på andra sidan av floden och det är inte vårt.",
    "pol": "Dom, który widzieliśmy, był po drugiej stronie rzeki, ale to nie jest nasz dom.",
    "tur": "Gördüğümüz ev nehrin diğer tarafında ve bu ev bizim için çok büyük.",
    "rus": "Дом, который мы видели, был на другой стороне реки, но это не наш дом.",
    "ukr": "Будинок, який ми бачили, був на іншому боці річки, але це не наш дім.",
    "ell": "Το σπίτι που είδαμε ήταν στην άλλη πλευρά του ποταμού.",
    "heb": "הבית שראינו היה בצד השני של הנהר.",
    "arb": "كان البيت الذي رأيناه على الجانب الآخر من النهر.",
    "hin": "जो घर हमने देखा वह नदी के दूसरी ओर था और यह हमारा नहीं है।",
    "jpn": "私たちが見た家は川の向こう側にありました。",
    "zho": "我们看到的房子在河的另一边。",
    "kor": "우리가 본 집은 강 건너편에 있었습니다.",
    "tha": "บ้านที่เราเห็นอยู่อีกฝั่งของแม่น้ำ",
}


@pytest.mark.parametrize(("language", "text"), TEXTS.items())
def test_a_sentence_of_each(language, text):
    found = detect(text)
    assert found.language == language
    assert 0.65 <= found.confidence <= 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "42 + 17 = 59",
        "Hat",
        "1. Face shield\n2. Hard hat\n3. Safety glasses",
        "und",
        "Berlin London Madrid Tokyo",
    ],
)
def test_what_cannot_be_told_is_undetermined(text):
    assert (detect(text).language, detect(text).confidence) == (UNDETERMINED, 0.0)


def test_two_languages_in_one_text_are_undetermined_when_neither_leads():
    both = f"{TEXTS['eng']} {TEXTS['fra']}"
    assert detect(both, confidence=0.9).language == UNDETERMINED
    assert detect(both, confidence=0.5).language in ("eng", "fra")
    assert detect(f"Привет мир {TEXTS['zho'][:8]}").language == UNDETERMINED


def test_code_is_left_out_and_a_text_of_code_is_code():
    code = "```python\nfor der in die: print(das)\n```"
    assert detect(code).language == "code"
    assert detect(f"{TEXTS['eng']}\n{code}").language == "eng"


def test_the_least_length():
    assert detect("The cat is on the mat", min_chars=100).language == UNDETERMINED
    assert detect("猫", min_chars=20).language == UNDETERMINED


def rows(path: str) -> list[dict[str, Any]]:
    with gzip.open(public_data(f"data/{path}.jsonl.gz"), "rt") as lines:
        return [json.loads(line) for line in lines]


def accuracy(pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Share told right of all, and of those told at all."""
    found = Counter(detect(text).language for _, text in pairs)
    right = sum(detect(text).language == language for language, text in pairs)
    return right / len(pairs), right / max(1, len(pairs) - found[UNDETERMINED])


@pytest.mark.parametrize(
    ("code", "least"),
    [
        ("et", 0.65),
        ("ht", 0.9),
        ("id", 0.85),
        ("it", 0.7),
        ("qu", 0.25),
        ("sw", 0.65),
        ("ta", 1),
        ("th", 1),
        ("tr", 0.9),
        ("vi", 0.9),
        ("zh", 1),
    ],
)
def test_labelled_texts_of_three_short_sentences(code, least):
    pairs = [
        (TWO_LETTERS[code], f"{r['premise']} {r['choice1']} {r['choice2']}")
        for r in rows("xcopa/xcopa")
        if r["lang"] == code
    ]
    told, precise = accuracy(pairs)
    assert told >= least
    assert precise >= 0.98


@pytest.mark.parametrize(
    ("path", "code", "least"),
    [
        ("ifeval/ifeval_input_data", "en", 0.97),
        ("m_ifeval/fr_input_data", "fr", 0.93),
        ("m_ifeval/es_input_data", "es", 0.85),
        ("m_ifeval/ja_input_data", "ja", 0.99),
    ],
)
def test_labelled_prompts(path, code, least):
    told, precise = accuracy([(TWO_LETTERS[code], r["prompt"]) for r in rows(path)])
    assert told >= least
    assert precise >= 0.98


def test_codes_are_three_letters():
    assert all(len(code) == 3 for code in LANGUAGES)
