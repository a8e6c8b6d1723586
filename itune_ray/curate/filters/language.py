"""Language: tags for balance and reports, and the languages wanted (methods D41)."""

import math
from typing import Any

from itune_ray.config.curate import LanguageConfig
from itune_ray.curate.filters.base import RowFilter, Verdict
from itune_ray.data.language import CODE, LANGUAGES, TWO_LETTERS, UNDETERMINED, Detected, detect
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError, did_you_mean


class Language(RowFilter):
    """Writes `lang`, `script`, `lang_prompt` and `lang_tag` into `meta`; rejects others as `language_CODE`.

    `lang` and `script` are those of the target: the final answer, or the text of a pretraining row; of a prompt row
    those of its prompt. `lang_prompt` is the language of all user turns. The tag is `monolingual` where both are equal,
    `cross_lingual` where they differ, `undetermined` where one cannot be told, and `code` where the target is all code.
    """

    provides = frozenset({"meta.lang", "meta.script", "meta.lang_prompt", "meta.lang_tag"})

    def __init__(self, config: LanguageConfig):
        self._config = config
        self._allowed = frozenset(_code(name) for name in config.allowed)

    def keep(self, record: Record) -> Verdict:
        prompt = self._detect("\n".join(m["content"] for m in record.prompt if m["role"] == "user"))
        answer = record.text if record.text is not None else record.response
        target = prompt if answer is None else self._detect(answer)
        meta: dict[str, Any] = {
            "lang": target.language,
            "script": target.script,
            "lang_tag": _tag(target, prompt, record),
        }
        if record.messages:
            meta["lang_prompt"] = prompt.language
        judged = {"target": [target], "prompt": [prompt], "both": [target, prompt]}[self._config.part]
        for found in judged if record.messages else [target]:
            if not self._fits(found.language):
                return Verdict(False, f"language_{found.language}", found.confidence or math.nan, meta=meta)
        return Verdict(True, meta=meta)

    def _detect(self, text: str) -> Detected:
        return detect(text, self._config.min_chars, self._config.confidence)

    def _fits(self, language: str) -> bool:
        if language == UNDETERMINED:
            return self._config.undetermined == "keep"
        return not self._allowed or language in self._allowed


def _tag(target: Detected, prompt: Detected, record: Record) -> str:
    if target.language == CODE:
        return CODE
    languages = {target.language} if not record.messages else {target.language, prompt.language}
    if UNDETERMINED in languages:
        return "undetermined"
    return "monolingual" if len(languages) == 1 else "cross_lingual"


def _code(name: str) -> str:
    """ISO 639-3 of a code of two or three letters."""
    code = TWO_LETTERS.get(name, name)
    if code not in LANGUAGES | {CODE}:
        known = sorted([*TWO_LETTERS, *LANGUAGES, CODE])
        raise ConfigError(
            f"no language of that code is known{did_you_mean(name, known)}",
            got=name,
            allowed=", ".join(sorted(TWO_LETTERS)) + ", their ISO 639-3 codes, or code",
            knob="filters.N.allowed",
        )
    return code
