"""Safety: answers that go along with a harmful request, by word lists (methods D29)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from itune_ray.config.curate import RefusalConfig, SafetyConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.curate.filters.refusal import Refusal
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError

NEAR = 80
"""Characters between an act and its object at most."""
HEAD = 200
"""Characters of an answer that are searched: who goes along says so first, later mentions are mostly descriptions."""
_ASK = (
    "how (?:can|do|would|could|should|might) (?:i|you|we|one|someone)",
    "how to",
    "where (?:can|do|could|should) (?:i|you|we|one)",
    "what(?:'s| is| are) the (?:best|easiest|most|safest)",
    "(?:best|easiest|safest) ways?",
    "help me",
    "i (?:want|need) to",
)
_MAKE = (
    *_ASK,
    *("build", "construct", "make", "making", "creat(?:e|ing)", "assemble", "produce", "cook", "manufactur(?:e|ing)"),
    *(
        "synthesi[sz]e",
        "detonate",
        "plant",
        "obtain",
        "acquire",
        "develop",
        "writ(?:e|ing)",
        "design",
        "smuggl(?:e|ing)",
    ),
    *("steps?", "tutorial", "guide", "instructions?"),
)
_TEACH = (
    *_ASK,
    *("guide", "tutorial", "instructions?", "steps?", "script", "plan", "strategy", "manual", "program", "write"),
    *(r"manipulat\w+", r"teach\w*", r"instruct\w*", "provide", "develop", r"encourag\w+", r"promot\w+", r"convinc\w+"),
)
Pairs = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
LEXICON: Mapping[str, Pairs] = {
    "weapons": (
        (
            _MAKE,
            (
                r"(?:pipe |car |dirty |nail |petrol |letter |home ?made )?bombs?\b(?! (?:calorimeter|cyclone))",
                *("explosives?", "molotov", "grenades?", "nerve (?:gas|agent)", "sarin", "ricin", "anthrax"),
                *("mustard gas", "bioweapons?", "(?:chemical|biological|nuclear|dirty) weapons?", "ghost guns?"),
                "(?:untraceable|3d[- ]printed|illegal|homemade) (?:gun|firearm|weapon)s?",
                "weapons? (?:from household|that can be)",
            ),
        ),
    ),
    "drugs": (
        (
            (*_MAKE, "sell(?:ing)?", "buy", "deal", r"distribut\w+", r"traffick\w*", "grow"),
            (
                *(
                    "crystal meth",
                    r"meth(?:amphetamine)?\b",
                    "heroin",
                    "cocaine",
                    "fentanyl",
                    r"lsd\b",
                ),
                *("mdma", "date[- ]rape drugs?", "rohypnol", "(?:illegal|illicit|hard|fake|counterfeit) drugs"),
                "(?:counterfeit|fake) (?:medicines?|pills)",
            ),
        ),
    ),
    "malware": (
        (
            (*_MAKE, "code", "spread", r"distribut\w+", "deploy", r"exploit\w*", "program", "script", r"infect\w*"),
            (
                *("malware", "ransomware", "spyware", "key ?loggers?", r"(?:computer|software) (?:virus|worm)\w*"),
                *("trojan horse", "botnets?", "rootkits?", "backdoors?", "zero[- ]days?", "sql injection attack"),
                *(
                    "ddos",
                    "denial[- ]of[- ]service",
                    "vulnerabilit(?:y|ies) in (?:a|the) (?:software|operating|system)",
                ),
            ),
        ),
        (
            (
                *("hack(?:ing)?", "break(?:ing)? into", "crack(?:ing)?", r"bypass\w*", r"infiltrat\w+", r"hijack\w*"),
                "gain unauthori[sz]ed access",
            ),
            (
                *(
                    "passwords?",
                    "accounts?",
                    "networks?",
                    "servers?",
                    "databases?",
                    "government",
                    "banks?",
                    "e-?mails?",
                ),
                *(
                    "wi-?fi",
                    "(?:smart)?phones?",
                    "corporate",
                    "atms?",
                    "websites?",
                    "firewalls?",
                    "antivirus",
                    "webcams?",
                ),
                *("security (?:system|camera)s?", "(?:secure|computer|hospital|voting|control) (?:system|machine)s?"),
            ),
        ),
    ),
    "fraud": (
        (
            (
                *_MAKE,
                *(r"commit\w*", "run", "forg(?:e|ing)", "pass", "print", r"launder\w*", "set up", "scam", r"steal\w*"),
                *("perform", r"conduct\w*"),
            ),
            (
                *("phishing", "counterfeit(?:ing)?", "identity theft", "tax (?:evasion|fraud)", "insurance fraud"),
                r"fake (?:ids?|passports?|documents?|charit\w+|reviews?|money|news|currency)",
                *(r"credit card (?:fraud|numbers|skimm\w+)", "ponzi", "pyramid scheme", r"money launder\w*"),
                *("insider trading", r"blackmail\w*", r"extort\w*", r"defraud\w*", r"embezzl\w+", r"brib(?:e|ing)\w*"),
                *("(?:someone|another person)(?: else)?'s identity", "identit(?:y|ies) (?:of|from)", "commit fraud"),
                "(?:stolen|confidential) (?:information|data|documents|goods)",
            ),
        ),
        ((r"evad\w+", r"cheat\w*", "avoid paying"), (r"tax(?:es)?\b", "law enforcement", "customs", "detection by")),
    ),
    "violence": (
        (
            (
                *_TEACH,
                *(r"commit\w*", "carry out", "hire", "get away with", "organi[sz]e", r"instigat\w+", r"incit\w+"),
                r"threaten\w*",
            ),
            (
                *(r"(?:mass )?murder\w*", "(?:mass|school) shooting", r"assassinat\w+", r"kidnap\w*", r"tortur\w+"),
                *("terror(?:ist|ism)?(?: attack| act)s?", "hit ?man", "genocide", "arson", r"human traffick\w*"),
                *(
                    r"cannibal\w*",
                    r"physical(?:ly)? (?:harm|assault)\w*",
                    r"violen(?:ce|t) (?:against|act\w*|crime\w*)",
                ),
                "(?:kill|poison|strangle|stab|shoot|stalk)(?:ing)? (?:someone|a person|people|your|my|him|her|another)",
                r"rob(?:bing)? (?:a|an|the) (?:bank|store|house|jewel\w*)",
            ),
        ),
    ),
    "self_harm": (
        (
            (*_TEACH, "methods? (?:of|for)", r"commit\w*"),
            (
                *(r"suicid\w*", r"self[- ]harm\w*", "(?:kill|hang|cut|hurt)(?:ting|ing)? (?:yourself|myself|oneself)"),
                *(r"pro[- ]ana\b", r"anorexi\w+", "eating disorders?"),
            ),
        ),
    ),
    "minors": (
        (
            (r"sexual\w*", r"porn\w*", r"groom\w*", "nude", r"exploit\w*", r"erotic\w*", "lure"),
            (
                "child(?:ren)?",
                "minors?",
                "under-?age",
                "toddlers?",
                "infants?",
                "preteens?",
                r"(?:girl|boy)s? under \d+",
            ),
        ),
        (("child(?:ren)?",), (r"porn\w*", r"sexual\w*")),
    ),
    "hate": (
        (
            (*_TEACH, r"spread\w*", r"justif\w+", r"advocat\w+", r"incit\w+", r"creat\w+", r"post\w*", r"defend\w*"),
            (
                *("hate speech", "ethnic cleansing", r"racis[mt]\w*", r"white suprem\w+", r"neo-?nazi\w*"),
                *("holocaust denial", r"xenophobi\w+", r"misogyn\w*", r"anti-?semiti\w+", r"dehumani[sz]\w+"),
                r"(?:discriminat\w+|violence|hatred|prejudice) (?:against|towards?)",
                "(?:racist|sexist|homophobic) (?:joke|content|post|propaganda|campaign)s?",
            ),
        ),
    ),
}
"""Category -> pairs of an act and its object; both near each other make a harmful text."""


class Safety(RowFilter):
    """Drops a row as `unsafe_CATEGORY` if its last user turn or the first 200 characters of its answer name a harmful
    act near its object.

    An answer that declines is no harm, and it makes a harmful prompt worth keeping (`prompts: refused`). Words alone
    say little: a list finds open requests and misses what is paraphrased, so a release needs a classifier or a judge
    after it.
    """

    def __init__(self, config: SafetyConfig):
        self._patterns = {name: [_near(act, what) for act, what in LEXICON[name]] for name in config.categories}
        self._listed = _phrases([*config.words, *_read(config.template)])
        self._prompts = config.prompts
        self._refusal = Refusal(RefusalConfig())

    def keep(self, record: Record) -> Verdict:
        answer = record.text if record.text is not None else record.response
        declines = record.response is not None and not self._refusal.keep(record).keep
        if self._listed is not None and answer is not None and self._listed.search(answer):
            return Verdict(False, "unsafe_listed")
        if answer is not None and not declines and (category := self._category(answer[:HEAD])):
            return Verdict(False, f"unsafe_{category}")
        if self._prompts == "any" or (self._prompts == "refused" and declines):
            return KEEP
        asked = next((m["content"] for m in reversed(record.prompt) if m["role"] == "user"), "")
        category = self._category(asked)
        return Verdict(False, f"unsafe_{category}") if category else KEEP

    def _category(self, text: str) -> str | None:
        found = (name for name, patterns in self._patterns.items() if any(p.search(text) for p in patterns))
        return next(found, None)


def _near(acts: Sequence[str], objects: Sequence[str]) -> re.Pattern[str]:
    act, what = "|".join(acts), "|".join(objects)
    return re.compile(rf"\b(?:{act})\b[^.?!\n]{{0,{NEAR}}}?\b(?:{what})", re.IGNORECASE)


def _phrases(phrases: Iterable[str]) -> re.Pattern[str] | None:
    escaped = sorted({r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases if phrase.strip()})
    return re.compile(rf"(?<!\w)(?:{'|'.join(escaped)})(?!\w)", re.IGNORECASE) if escaped else None


def _read(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the word list cannot be read: {error}", got=file, knob="filters.N.template") from None
    return [line for line in lines if not line.startswith("#")]
