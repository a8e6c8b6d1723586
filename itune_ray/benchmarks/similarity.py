"""Similarity of a response and a reference: BLEU, ROUGE, chrF, exact match, each with the tokenizer of its language.

The tokenizer is where such scores go wrong silently. BLEU's default (13a) takes a Japanese or Chinese sentence for one
word; rouge_score's drops everything outside a-z and 0-9, so that a Japanese pair always scores 0 and French words
break at their accents. Hence every text is tokenized by its language, given with the row or told by its script.
"""

import functools
import importlib.util
import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer, tokenizers
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from itune_ray.benchmarks.base import Floats

MAX_ORDER = 4
_SCRIPTS = (
    ("ja", re.compile(r"[぀-ヿ]")),  # kana; before Han, which Japanese uses too
    ("ko", re.compile(r"[ᄀ-ᇿ가-힯]")),
    ("zh", re.compile(r"[㐀-䶿一-鿿]")),
    ("th", re.compile(r"[฀-๿]")),
)
_UNSPACED = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯฀-๿]|[^\W_぀-ヿ㐀-䶿一-鿿가-힯฀-๿]+")
"""One character of a script written without spaces (Hangul syllables go apart too, as is usual), or a whole word."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def language_of(text: str, told: str | None = None) -> str:
    """ISO 639-1 code: the one told, else by script (ja, ko, zh, th), `en` where all letters are ASCII, else `und`."""
    if told:
        return told.lower().split("-")[0]
    for language, script in _SCRIPTS:
        if script.search(text):
            return language
    return "en" if all(c.isascii() for c in text if c.isalpha()) else "und"


def bleu_tokenizer(language: str) -> str:
    """sacreBLEU's tokenizer for a language: 13a, zh, ja-mecab or ko-mecab where installed, else single characters."""
    if language == "zh":
        return "zh"
    if language in ("ja", "ko"):
        dictionary = {"ja": "ipadic", "ko": "mecab_ko"}[language]
        return f"{language}-mecab" if importlib.util.find_spec(dictionary) else "char"
    return "char" if language == "th" else "13a"


@functools.cache
def _bleu(tokenizer: str, effective_order: bool) -> BLEU:
    return BLEU(tokenize=tokenizer, effective_order=effective_order)


def sentence_bleu(response: str, reference: str, language: str) -> float:
    """Sentence BLEU, 0 to 100, exponential smoothing and effective order (Papineni 2002, Post 2018)."""
    return _bleu(bleu_tokenizer(language), True).sentence_score(response, [reference]).score


def bleu_sums(response: str, reference: str, language: str) -> tuple[float, ...]:
    """Corpus BLEU's additive statistics: matched n-grams (1-4), n-grams (1-4), response length, reference length."""
    found = _bleu(bleu_tokenizer(language), True).sentence_score(response, [reference])
    return tuple(float(x) for x in (*found.counts, *found.totals, found.sys_len, found.ref_len))


def corpus_bleu(sums: Floats) -> Floats:
    """BLEU of summed statistics `[..., 10]`, 0 to 100: sacreBLEU's corpus score with exponential smoothing."""
    matched, total = sums[..., :MAX_ORDER], sums[..., MAX_ORDER : 2 * MAX_ORDER]
    response, reference = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        empty_orders = np.cumsum((matched == 0) & (total > 0), axis=-1)
        precision = np.where(matched > 0, matched, 0.5**empty_orders) / total
        brevity = np.where(response < reference, np.exp(1 - reference / response), 1.0)
        score = 100 * brevity * np.exp(np.log(precision).mean(axis=-1))
    possible = (total > 0).all(axis=-1) & (matched > 0).any(axis=-1) & (response > 0)
    return np.where(possible, score, np.where(reference > 0, 0.0, np.nan))


def bleu_signature(languages: Sequence[str]) -> str:
    """sacreBLEU's signature, one per tokenizer in use."""
    names = sorted({bleu_tokenizer(language) for language in languages})
    return "; ".join(_signature(name) for name in names)


def _signature(tokenizer: str) -> str:
    metric = BLEU(tokenize=tokenizer)
    metric.corpus_score(["a b c d"], [["a b c d"]])  # the number of references is known only once it has scored
    return str(metric.get_signature())


@functools.cache
def _chrf() -> CHRF:
    return CHRF()


def chrf(response: str, reference: str) -> float:
    """chrF2 of one pair, 0 to 100 (Popović 2015); needs no tokenizer."""
    return _chrf().sentence_score(response, [reference]).score


class _UnicodeWords(tokenizers.Tokenizer):
    """Words of any alphabet in lower case; single characters where a script puts no spaces."""

    def tokenize(self, text: str) -> list[str]:
        return _UNSPACED.findall(text.lower())


@functools.cache
def _rouge(english: bool) -> rouge_scorer.RougeScorer:
    kinds = ["rouge1", "rouge2", "rougeL"]
    if english:
        return rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    return rouge_scorer.RougeScorer(kinds, tokenizer=_UnicodeWords())


def rouge(response: str, reference: str, language: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1 (Lin 2004); English with Porter's stemmer, as in its own scorer."""
    scores = _rouge(language == "en").score(reference, response)
    return {kind: float(score.fmeasure) for kind, score in scores.items()}


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar 2016): lower case, no punctuation, no English articles, single spaces."""
    lowered = unicodedata.normalize("NFC", text).lower()
    bare = "".join(c for c in lowered if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(response: str, reference: str) -> bool:
    """Whether two texts are equal after `normalise_answer`."""
    return normalise_answer(response) == normalise_answer(reference)
