"""The language filter: tags in `meta`, and languages that are not wanted go (methods D41)."""

import math
import pickle
from typing import Any

import pytest

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.curate.filters import load_filter
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError

EN = "The house that we saw was on the other side of the river."
FR = "La maison que nous avons vue était de l'autre côté de la rivière."
CODE = "```\nx = 1\n```"


def made(**config: Any) -> Any:
    section = {"type": "language", **config}
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [section]}
    return load_filter(validate(CurateJob, job, "x").filters[0])


def row(prompt: str, answer: str | None = None) -> Record:
    messages = [{"role": "system", "content": FR}, {"role": "user", "content": prompt}]
    return Record(
        source="s",
        position=0,
        messages=(*messages, *([] if answer is None else [{"role": "assistant", "content": answer}])),
    )


@pytest.mark.parametrize(
    ("record", "lang", "prompt", "tag"),
    [
        (row(EN, EN), "eng", "eng", "monolingual"),
        (row(EN, FR), "fra", "eng", "cross_lingual"),
        (row(EN, "Oui"), "und", "eng", "undetermined"),
        (row(EN, CODE), "code", "eng", "code"),
        (row(FR), "fra", "fra", "monolingual"),
        (Record(source="s", position=0, text=EN), "eng", None, "monolingual"),
    ],
)
def test_tags(record, lang, prompt, tag):
    verdict = pickle.loads(pickle.dumps(made())).keep(record)
    assert verdict.keep
    assert (verdict.meta["lang"], verdict.meta.get("lang_prompt"), verdict.meta["lang_tag"]) == (lang, prompt, tag)
    assert verdict.meta["script"] == ("Zyyy" if lang == "code" else "Latn")


@pytest.mark.parametrize(
    ("config", "record", "reason"),
    [
        ({"allowed": ["en"]}, row(FR, EN), None),
        ({"allowed": ["eng"]}, row(EN, FR), "language_fra"),
        ({"allowed": ["en"], "part": "prompt"}, row(FR, EN), "language_fra"),
        ({"allowed": ["en"], "part": "both"}, row(FR, EN), "language_fra"),
        ({"allowed": ["en", "fr"], "part": "both"}, row(FR, EN), None),
        ({"allowed": ["en"]}, row(EN, "Oui"), None),
        ({"allowed": ["en"], "undetermined": "drop"}, row(EN, "Oui"), "language_und"),
        ({"undetermined": "drop"}, row(EN, FR), None),
        ({"allowed": ["en"]}, row(EN, CODE), "language_code"),
        ({"allowed": ["en", "code"]}, row(EN, CODE), None),
        ({"allowed": ["en"], "part": "prompt"}, Record(source="s", position=0, text=FR), "language_fra"),
    ],
)
def test_what_is_allowed(config, record, reason):
    verdict = made(**config).keep(record)
    assert (verdict.keep, verdict.reason) == (reason is None, reason)
    assert verdict.meta["lang_tag"]
    assert math.isnan(verdict.score) is (reason in (None, "language_und"))


def test_an_unknown_code_is_told():
    with pytest.raises(ConfigError, match=r"no language of that code.*'xx'.*`filters\.N\.allowed`"):
        made(allowed=["xx"])
