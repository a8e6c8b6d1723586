"""The playground's tokenizer: whole words of the wordings, single characters for everything else.

A BPE without merges: pre-tokens that are in the vocabulary stay whole, all others fall to characters, so open words
are spelled letter by letter, which is what letter tasks need.
"""

import re
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from itune_ray.playground import families, sets, words

PAD, BOS, END, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
PRE_TOKEN = r" ?[\p{L}']+| ?[0-9]+| [:,?.+-](?= |$)|\n|."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %} {{ message['content'] | trim }}<|end|>{% endgeneration %}"
    "{% else %}<|user|> {{ message['content'] | trim }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(folder: Path) -> PreTrainedTokenizerFast:
    """Make the tokenizer and save it to a folder."""
    specials = [PAD, BOS, END, USER, ASSISTANT]
    vocabulary = {word: number for number, word in enumerate([*specials, *_characters(), *_whole_words()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def _characters() -> list[str]:
    accents = "àâçéèêîôûùáíóúñ¿¡"
    return ["\n", *string.printable[:95], *accents, *(a for a in accents.upper() if a not in accents)]


def _whole_words() -> list[str]:
    """Every word of the wordings and of running text, with its leading space; a few that follow a quote, without."""
    texts: list[str] = []
    for family in families.FAMILIES:
        texts += [*family.seen, *family.held]
    for group in (families.FRAMES, families.HELD_FRAMES, sets.STATEMENTS):
        texts += [text for forms in group.values() for text in forms]
    texts += [*sets.INVENT, *sets.LIKE, *sets.ABOUT_HARM, *sets.ABOUT_SAFE, *sets.PEOPLE, *sets.DOINGS, *sets.PLACES]
    texts += [
        *families.HARMS,
        *families.SAFE,
        *families.CLOSINGS,
        families.REFUSAL,
        "To",
        *families.STEPS,
        *families.WRAPS,
    ]
    for table in (words.NOUNS, words.COLOURS):
        texts += [word for english, others in table.items() for word in (english, *others)]
    found = {word for text in texts for word in re.findall(r"[^\W\d_][\w']*|'\w+", re.sub(r"\{\w+\}", " ", text))}
    whole = sorted(f" {word}" for word in found if len(word) > 1) + [f" {letter}" for letter in "aIài"]
    marks = [f" {mark}" for mark in ":,?.+-"]
    return [*dict.fromkeys(whole), *marks, *(f" {n}" for n in range(100)), "word", "first", "last"]
