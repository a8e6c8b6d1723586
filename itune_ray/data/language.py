"""Scripts by Unicode and languages by their function words: enough to tag and balance rows (methods D41).

A script is exact: each letter has one. A language is read off the commonest words and the special letters of the
languages below, which needs a sentence or two; where several fit or none does it is undetermined, never guessed.
"""

import functools
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

SCRIPTS: Mapping[str, str] = {
    "ARABIC": "Arab",
    "ARMENIAN": "Armn",
    "BENGALI": "Beng",
    "BOPOMOFO": "Bopo",
    "CHEROKEE": "Cher",
    "CJK": "Hani",
    "COPTIC": "Copt",
    "CYRILLIC": "Cyrl",
    "DEVANAGARI": "Deva",
    "ETHIOPIC": "Ethi",
    "GEORGIAN": "Geor",
    "GREEK": "Grek",
    "GUJARATI": "Gujr",
    "GURMUKHI": "Guru",
    "HANGUL": "Hang",
    "HEBREW": "Hebr",
    "HIRAGANA": "Hira",
    "KANNADA": "Knda",
    "KATAKANA": "Kana",
    "KHMER": "Khmr",
    "LAO": "Laoo",
    "LATIN": "Latn",
    "MALAYALAM": "Mlym",
    "MONGOLIAN": "Mong",
    "MYANMAR": "Mymr",
    "ORIYA": "Orya",
    "SINHALA": "Sinh",
    "SYRIAC": "Syrc",
    "TAMIL": "Taml",
    "TELUGU": "Telu",
    "THAANA": "Thaa",
    "THAI": "Thai",
    "TIBETAN": "Tibt",
}
"""First word of a letter's Unicode name -> ISO 15924."""
ONLY: Mapping[str, str] = {
    "Armn": "hye",
    "Beng": "ben",
    "Ethi": "amh",
    "Geor": "kat",
    "Grek": "ell",
    "Gujr": "guj",
    "Guru": "pan",
    "Hang": "kor",
    "Hani": "zho",
    "Hebr": "heb",
    "Jpan": "jpn",
    "Khmr": "khm",
    "Knda": "kan",
    "Laoo": "lao",
    "Mlym": "mal",
    "Mymr": "mya",
    "Orya": "ori",
    "Sinh": "sin",
    "Taml": "tam",
    "Telu": "tel",
    "Thai": "tha",
    "Tibt": "bod",
}
"""Script -> the language that nearly all text in it is in (ISO 639-3)."""

_WORDS: Mapping[str, str] = {
    "eng": "the of and to in is that it was for on are with as his they be at this have from or had by but not "
    "what all were we when your can said there use an each which she do how their if will he my you her "
    "who has been would its about these should because could into me him",
    "fra": "le la les de des du et un une est que qui dans pour pas sur au aux avec ce cette il elle ils nous "
    "vous je ne se sont par plus mais ou où son sa ses leur être été fait comme c'est l'on d'un d'une n'a "
    "qu'il était votre",
    "spa": "el la los las de del y en un una es que por para con no se su sus lo como más pero al le ha fue este "
    "esta son entre cuando muy sin sobre también ser hay está qué si yo mi era porque desde nos ella él "
    "hizo otro otra otros todo todos estaba años cada bien eso esa puede tiene",
    "deu": "der die das und in den von zu mit sich des auf für ist im dem nicht ein eine als auch es an werden "
    "aus er hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
    "oder ich wir kann ihr",
    "ita": "il lo la i gli le di del della e in un una è che per non con si da sono come più anche al alla nel "
    "nella dei delle ha ma su questo questa era mi ho suo sua ed o perché se cosa quando stato hanno loro "
    "ci dal aveva era stata sua quello quella gli dell'altra all'altra fare molto mia tutto dopo uomo "
    "donna",
    "por": "o a os as de do da dos das e em um uma é que para não com se por mais como mas ao foi ele ela no na "
    "nos nas seu sua ou ser quando muito há já está eu também só pelo pela até isso você são tem à",
    "nld": "de het een en van in is dat op te zijn met voor niet aan er om ook als dan maar bij door over naar "
    "uit tot je ik hij ze wij was worden wordt deze dit heeft hebben kan nog wat meer geen of had zij "
    "mijn hun werd",
    "swe": "och att det i en som är på för med av den till inte om ett han har jag de var från vi kan när så men "
    "hon sig eller hade skulle där ut också efter vid nu under mycket detta hur blev sin sitt över",
    "dan": "og at det i en som er på for med af den til ikke om et han har jeg de var fra vi kan når så men hun "
    "sig eller havde skulle der ud også efter ved nu under meget dette hvordan blev sin sit over blive "
    "mig noget",
    "nob": "og at det i en som er på for med av den til ikke om et han har jeg de var fra vi kan når så men hun "
    "seg eller hadde skulle der ut også etter ved nå under mye dette hvordan ble sin sitt over bli meg "
    "noe",
    "fin": "ja on ei se että oli hän ovat myös kun mutta joka tai niin kuin ole olla sen jos hänen mitä vain jo "
    "nyt voi ne mukaan minä sinä mikä tämä tässä siitä kuinka koska sitä ollut joka jonka kanssa ennen "
    "jälkeen",
    "est": "ja on ei see et oli ta ning ka kui aga mis või oma seda tema mida siis kes nad olid ma üle pärast "
    "selle kuid veel sai ära välja oma mul tal tegi mees naine minu tuli poiss tüdruk läks sest",
    "pol": "i w na z do się nie to że jest o jak ale po co za od tak dla przez być by czy był była było są już "
    "tylko jego jej tym ten ta które który która może go mnie ich oraz przed aby kiedy jestem",
    "ces": "a v na se je že s z do o to i k ve pro jako by ale jsem jsou za po od byl byla bylo jeho který která "
    "které tak jak při co aby nebo když až už může této před není mezi jen bude",
    "slk": "a v na sa je že s z do o to i k vo pre ako by ale som sú za po od bol bola bolo jeho ktorý ktorá "
    "ktoré tak pri čo aby alebo keď až už môže tejto pred nie medzi len bude",
    "hun": "a az és hogy nem is egy van ez volt meg de csak ha mint már még el kell vagy azt ki le mert be aki "
    "ami minden én ő ezt szerint után lesz voltak való között lehet pedig nagyon",
    "ron": "și de în a la cu pe un o nu este că din pentru care mai au fost sunt ce se să ca sau prin dar lui ei "
    "al ale am ai după până când cum foarte fi era într-o această acest",
    "tur": "ve bir bu da de için ile o çok daha ama gibi olan olarak kadar sonra ne var ben mi en değil ki şey "
    "her onun kadın adam benim oldu yok ya nasıl diye veya göre önce onu bunu olduğu etti çocuk kız",
    "vie": "và của là có không được cho một các trong đã với những này người khi ông đó để từ tôi cô anh đến ra "
    "vào nhưng như về thì làm rất bị nó cũng phải trên ấy mình sẽ đang lại bà",
    "ind": "yang dan di dari ini itu dengan untuk tidak dalam akan pada adalah ke saya karena juga ada oleh "
    "sebagai tersebut bisa kami dia mereka atau anda lebih sudah telah seorang para tetapi saat seperti "
    "nya bahwa pria wanita",
    "swh": "na ya wa kwa ni za la katika cha kuwa alikuwa hii huo yake wake kama lakini hiyo huyo mtu watu yangu "
    "wangu hakuwa ili sana pia baada kwamba vya kwenye kila sasa bado wote mwana alihisi alikua aliamua "
    "nje nyumbani mimi wao mwanamke mwanamume alikua yeye wao hivyo kutoka msichana mvulana",
    "hat": "nan te li ak pou yo yon sa ki pa ap gen fè men mwen nou tout si lè sou a ou konsa kay moun fi gason "
    "la an kò pran ale vle manman papa kote paske",
    "que": "hinaspa chay mana manam hina warmi qari runa wasi paymi chaymi huk manañam kanchu kasqa karqa "
    "kachkan ñuqa ñuqam payqa warmiqa qariqa runaqa warmacha kashan sipasqa maqtaqa ñuqaqa kay "
    "kasqanrayku chayna lliw",
    "cat": "el la els les de del i en un una és que per amb no es al dels com més però seva seu són aquest "
    "aquesta va ser ha hi també o si han perquè molt entre fins quan sense ho jo això",
    "rus": "и в не на я что он с как это по но из у за то от его так для же она мы вы а был была было бы ты к о "
    "все если или мне только они ее когда уже чтобы нет при может этот",
    "ukr": "і в не на я що він з як це по але із у за то від його так для же вона ми ви а був була було б ти до "
    "та якщо або мені тільки вони її коли вже щоб немає при може цей є також",
    "bul": "и в не на аз че той с как това по но от у за то неговия така за тя ние вие а беше бе би ти към са е "
    "да се ако или ми само те когато вече няма при може този които като много",
    "srp": "и у не на ја да он са како то по али из за од његов тако она ми ви а био била било би ти ка је су се "
    "ако или само они када већ нема при може овај који као што",
    "hin": "है के में की और का को से पर यह हैं नहीं कि एक था ने भी कर लिए हो तो इस या जो वह",
    "mar": "आहे आणि च्या या ते हे तो ती मध्ये नाही होते होता एक त्या साठी आहेत की व मी असे",
    "nep": "छ र को मा का लाई छन् यो भएको गर्न पनि हुन् एक थियो ले त्यो हुन्छ",
    "arb": "في من على أن إلى هذا التي الذي هذه عن مع كان لا ما هو هي أو قد كل بعد بين لم ذلك كما",
    "pes": "در از به که این را با است برای آن می یک خود تا بر هم نیز شد بود ها شود کرد ما من او",
    "urd": "ہے کے میں کی اور کا کو سے پر یہ ہیں نہیں کہ ایک تھا نے بھی کر لیے ہو تو اس جو وہ",
}
"""Language (ISO 639-3) -> its commonest words."""
_LETTERS: Mapping[str, str] = {
    "deu": "ßäöü",
    "fra": "çœêèàùîôû",
    "spa": "ñ¿¡áíóú",
    "por": "ãõçâê",
    "ita": "èàòìù",
    "swe": "åäö",
    "dan": "æøå",
    "nob": "æøå",
    "fin": "äö",
    "est": "õäöü",
    "pol": "łąęśżźćń",
    "ces": "řůěčšžýá",
    "slk": "ľĺŕôäčšžý",
    "hun": "őűáéíóöü",
    "ron": "șțşţăâî",
    "tur": "ğışçöü",
    "vie": "đơưạảấầậắặẹẻếềểệịọỏốồộớờợụủứừửữựỳýă",
    "cat": "·çàèòï",
    "hat": "èòàé",
    "que": "ñ",
    "rus": "ыэёъ",
    "ukr": "іїєґ",
    "bul": "ъщ",
    "srp": "ђјљњћџ",
    "pes": "پچژگکی",
    "urd": "ٹڈڑںےہھ",
    "arb": "ةىأإك",
    "mar": "ळ",
}
"""Language -> letters that others of its script do without."""
LETTER_VOTE = 0.5
"""Of a special letter, in words."""
MIN_VOTES = 0.05
"""Votes per word of the text that a language needs at least, one in all."""
MIN_VOTERS = 2
"""Different words or letters that must speak for it: `hat` is an English word too."""
UNDETERMINED = "und"
CODE = "code"
"""Pseudo-language of a text that is nearly all code, as in xP3."""
TWO_LETTERS: Mapping[str, str] = {
    "am": "amh", "ar": "arb", "bg": "bul", "bn": "ben", "bo": "bod", "ca": "cat", "cs": "ces", "da": "dan", "de": "deu",
    "el": "ell", "en": "eng", "es": "spa", "et": "est", "fa": "pes", "fi": "fin", "fr": "fra", "gu": "guj", "he": "heb",
    "hi": "hin", "ht": "hat", "hu": "hun", "hy": "hye", "id": "ind", "it": "ita", "ja": "jpn", "ka": "kat", "km": "khm",
    "kn": "kan", "ko": "kor", "lo": "lao", "ml": "mal", "mr": "mar", "my": "mya", "nb": "nob", "ne": "nep", "nl": "nld",
    "no": "nob", "or": "ori", "pa": "pan", "pl": "pol", "pt": "por", "qu": "que", "ro": "ron", "ru": "rus", "si": "sin",
    "sk": "slk", "sr": "srp", "sv": "swe", "sw": "swh", "ta": "tam", "te": "tel", "th": "tha", "tr": "tur", "uk": "ukr",
    "ur": "urd", "vi": "vie", "zh": "zho",
}  # fmt: skip
"""ISO 639-1 -> ISO 639-3."""
LANGUAGES = frozenset(TWO_LETTERS.values())
_CODE = re.compile(r"(?P<fence>`{3,}|~{3,}).*?(?:(?P=fence)|\Z)|`[^`\n]+`", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True, slots=True)
class Detected:
    """What a text is written in."""

    language: str
    """ISO 639-3, `code`, or `und` where too little speaks for any."""
    script: str
    """ISO 15924 of most letters; `Jpan` for kana and Han together, `Zyyy` for a text without letters."""
    confidence: float
    """The language's votes over its own and the runner-up's, or its script's share of the letters; 0 where
    undetermined."""


def detect(text: str, min_chars: int = 20, confidence: float = 0.65) -> Detected:
    """Script and language of a text, code left out.

    Args:
        text: Any text.
        min_chars: A text with fewer letters is undetermined, unless its script tells; a letter of a script without
            spaces between words counts twice.
        confidence: A language below this is undetermined.
    """
    prose = _CODE.sub(" ", text)
    counts = script_counts(prose)
    script = main_script(counts)
    letters = sum(counts.values())
    if len(prose.strip()) < len(text.strip()) / 2 and letters < min_chars:
        return Detected(CODE, script, 1.0)
    if script in ONLY:
        enough = letters * 2 >= min_chars
        share = _share(counts, script)
        known = enough and share >= confidence
        return Detected(ONLY[script] if known else UNDETERMINED, script, share if known else 0.0)
    if letters < min_chars:
        return Detected(UNDETERMINED, script, 0.0)
    language, score = _by_words(prose, script)
    known = score >= confidence
    return Detected(language if known else UNDETERMINED, script, score if known else 0.0)


_ASCII_LETTERS = string.ascii_letters.encode()


@functools.lru_cache(maxsize=2**16)
def script_of(letter: str) -> str | None:
    """ISO 15924 script of a letter by its Unicode name; None for what is no letter or belongs to many scripts."""
    if not unicodedata.category(letter).startswith("L"):
        return None
    words = unicodedata.name(letter, "").split()
    if words[:1] in (["FULLWIDTH"], ["HALFWIDTH"]):
        words = words[1:]
    return SCRIPTS.get(words[0].partition("-")[0]) if words else None


def script_counts(text: str) -> Counter[str]:
    """Letters of a text by script."""
    found: Counter[str] = Counter()
    if text.isascii():
        latin = len(text) - len(text.encode().translate(None, _ASCII_LETTERS))
        return Counter({"Latn": latin} if latin else {})
    for letter, count in Counter(text).items():
        script = script_of(letter)
        if script is not None:
            found[script] += count
    return found


def main_script(counts: Mapping[str, int]) -> str:
    """The script of most letters: kana and Han together are Japanese where a tenth of them is kana."""
    kana, han = counts.get("Hira", 0) + counts.get("Kana", 0), counts.get("Hani", 0)
    joined = {name: count for name, count in counts.items() if name not in ("Hira", "Kana", "Hani")}
    if kana + han:
        joined["Jpan" if kana * 10 >= kana + han else "Hani"] = kana + han
    return max(sorted(joined), key=lambda name: joined[name], default="Zyyy")


def _share(counts: Mapping[str, int], script: str) -> float:
    parts = {"Jpan": ("Hira", "Kana", "Hani"), "Hani": ("Hira", "Kana", "Hani")}.get(script, (script,))
    return sum(counts.get(part, 0) for part in parts) / sum(counts.values())


def _by_words(text: str, script: str) -> tuple[str, float]:
    """The language with most votes, and its own over its own and the runner-up's; undetermined where few words vote.

    A word or letter that k languages of the script share gives each 1/k of a vote.
    """
    words, letters = _votes()
    votes: dict[str, float] = defaultdict(float)
    folded = unicodedata.normalize("NFC", text).casefold().replace("’", "'")
    said = _WORD.findall(folded)
    voters: Counter[str] = Counter()
    for word, count in Counter(filter(words.__contains__, said)).items():
        for language in words[word]:
            votes[language] += count / len(words[word])
            voters[language] += 1
    for letter, count in () if folded.isascii() else Counter(folded).items():  # special letters are beyond ASCII
        for language in letters.get(letter, ()):
            votes[language] += LETTER_VOTE * count / len(letters[letter])
            voters[language] += 1
    ranked = sorted(
        ((vote, name) for name, vote in votes.items() if _SCRIPT_OF[name] == script), key=lambda v: (-v[0], v[1])
    )
    if not ranked or ranked[0][0] < max(1, MIN_VOTES * len(said)) or voters[ranked[0][1]] < MIN_VOTERS:
        return UNDETERMINED, 0.0
    second = ranked[1][0] if len(ranked) > 1 else 0.0
    return ranked[0][1], ranked[0][0] / (ranked[0][0] + second)


@functools.cache
def _votes() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Word -> languages, letter -> languages."""
    words: dict[str, set[str]] = defaultdict(set)
    letters: dict[str, set[str]] = defaultdict(set)
    for language, listed in _WORDS.items():
        for word in listed.split():
            words[word].add(language)
    for language, listed in _LETTERS.items():
        for letter in listed:
            letters[letter].add(language)
    frozen = [{key: tuple(sorted(value)) for key, value in table.items()} for table in (words, letters)]
    return frozen[0], frozen[1]


_SCRIPT_OF: Mapping[str, str] = {language: main_script(script_counts(words)) for language, words in _WORDS.items()}
"""Language -> the script of its words."""
