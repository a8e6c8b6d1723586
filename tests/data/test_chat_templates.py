"""Chat templates of published model families, from the packages that ship them, on a tokenizer with their tokens."""

from pathlib import Path

import pytest
import tiny
import trl
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from tokenizers import AddedToken
from trl.chat_template_utils import is_chat_template_stop_token_trained

from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer, TemplateRewritesHistory
from itune_ray.data.order import PackedTable
from itune_ray.data.records import Record
from itune_ray.errors import TrainError
from itune_ray.train.prepare import prepare_locally

TRL = Path(trl.__file__).parent / "chat_templates"
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
FAMILIES = {
    "llama3": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama3_1": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama3_2": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama3_training": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "qwen2_5": (CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen2_5_training": (CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen3_training": (CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen3_instruct_2507": (CHATML, None, "<|im_end|>", "<|im_end|>"),
    "gemma3": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "gemma3_training": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "mistral_v3": (MISTRAL, "<s>", "</s>", "</s>"),
    "mistral_v7": (MISTRAL, "<s>", "</s>", "</s>"),
}
"""Template -> control tokens, beginning of text, end of text, end of turn."""
DIALOGUE = (
    {"role": "user", "content": "apple?"},
    {"role": "assistant", "content": "river stone"},
    {"role": "user", "content": "cloud?"},
    {"role": "assistant", "content": "maple tiger"},
)
SYSTEM = {"role": "system", "content": "be brief"}


def template(family: str) -> str:
    if family.startswith("mistral"):
        version = TokenizerVersion(family.removeprefix("mistral_"))
        flags = dict.fromkeys(("image_support", "audio_support", "thinking_support", "plain_thinking_support"), False)
        unset = dict.fromkeys(("model_settings_fields", "reasoning_effort_values", "reasoning_effort_default"))
        return generate_chat_template(
            spm=True,
            tokenizer_version=version,
            default_system_prompt=None,
            use_special_token_variables=True,
            **flags,
            **unset,
        )
    return (TRL / f"{family}.jinja").read_text()


def tokenizer(family: str):
    control, bos, eos, _ = FAMILIES[family]
    words = tiny.split_as_published(tiny.tokenizer(template(family)))
    words.add_special_tokens({"additional_special_tokens": control})
    words.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    words.bos_token, words.eos_token = bos, eos
    return words


def answers(renderer: ChatRenderer, messages=DIALOGUE, supervise="assistant") -> str:
    ids, supervised = renderer.training_ids(messages, supervise)
    return renderer.tokenizer.decode([i for i, flag in zip(ids, supervised, strict=True) if flag])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [DIALOGUE, (SYSTEM, *DIALOGUE)], ids=["plain", "system"])
def test_ids_are_those_of_apply_chat_template(family, messages):
    words = tokenizer(family)
    renderer = ChatRenderer(words)
    whole = words.apply_chat_template(list(messages))["input_ids"]
    assert renderer.training_ids(messages, "last_assistant").input_ids == whole
    asked = words.apply_chat_template(list(messages[:-1]), add_generation_prompt=True)["input_ids"]
    assert renderer.prompt_ids(messages[:-1]) == asked


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("qwen3")])
def test_every_answer_and_its_end_of_turn_is_supervised_and_nothing_else(family):
    words = tokenizer(family)
    end = FAMILIES[family][-1]
    opens = "\n" if family == "qwen2_5_training" else ""  # this one counts the line break after the role as the model's
    renderer = ChatRenderer(words)
    assert answers(renderer).replace(" ", "") == f"{opens}riverstone{end}{opens}mapletiger{end}"
    assert answers(renderer, supervise="last_assistant").replace(" ", "") == f"{opens}mapletiger{end}"
    assert not renderer.never_ends(renderer.training_ids(DIALOGUE))


@pytest.mark.parametrize("family", ["llama3_training", "qwen2_5_training", "qwen3_training", "gemma3_training"])
def test_marked_templates_supervise_what_trl_does_but_for_white_space_after_the_end(family):
    words = tokenizer(family)
    assert is_chat_template_stop_token_trained(words)
    theirs = words.apply_chat_template(list(DIALOGUE), return_assistant_tokens_mask=True, return_dict=True)
    ids, ours = ChatRenderer(words).training_ids(DIALOGUE)
    assert ids == theirs["input_ids"]
    beside = [i for i, mine, other in zip(ids, ours, theirs["assistant_masks"], strict=True) if mine != bool(other)]
    assert all(not words.decode([i]).strip() for i in beside)
    assert sum(ours) == sum(theirs["assistant_masks"]) - len(beside)


def test_a_reasoning_template_that_drops_old_thoughts_is_trained_answer_by_answer(tmp_path):
    words = tokenizer("qwen3")
    renderer = ChatRenderer(words)
    thought = tuple(
        {**m, "content": f"<think>\nlemon\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
        for m in DIALOGUE
    )
    with pytest.raises(TemplateRewritesHistory):
        renderer.training_ids(thought)
    words.save_pretrained(tmp_path / "words")
    job = tiny.job(tmp_path / "words", packing=True, pack_length=256, batch=1, steps=1)
    prepared = prepare_locally(job, [Record(source="t", position=0, messages=thought)], str(tmp_path / "stage"))
    (row,) = PackedTable(prepared.folder).rows(0)
    first, second = (renderer.training_ids(thought[:end], "last_assistant") for end in (2, 4))
    assert row.input_ids.tolist() == first.input_ids + second.input_ids
    assert row.supervised.tolist() == first.supervised + second.supervised
    assert row.lengths.tolist() == [len(first.input_ids), len(second.input_ids)]
    text = words.decode([i for i, on in zip(row.input_ids, row.supervised, strict=True) if on])
    assert text.count("lemon") == 2 == text.count("<|im_end|>")


def test_a_dialogue_that_does_not_fit_answer_by_answer_says_so(tmp_path):
    tokenizer("qwen3").save_pretrained(tmp_path / "words")
    job = tiny.job(tmp_path / "words", packing=True, max_length=64)
    with pytest.raises(TrainError, match="too_long"):
        prepare_locally(job, [Record(source="t", position=0, messages=DIALOGUE * 2)], str(tmp_path / "stage"))


def refused(job: TrainJob, stage: Path, match: str) -> None:
    with pytest.raises(TrainError, match=match):
        prepare_locally(job, [Record(source="t", position=0, messages=DIALOGUE)], str(stage))


def test_training_does_not_start_without_supervised_tokens_or_without_an_end_of_turn(tmp_path):
    folder = tmp_path / "words"
    tiny.tokenizer().save_pretrained(folder)
    silent = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    refused(tiny.job(folder, **{"model.chat_template": silent}), tmp_path / "silent", "no_supervised_tokens")
    endless = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    refused(tiny.job(folder, **{"model.chat_template": endless}), tmp_path / "endless", "no_end_of_turn")
    plain = tiny.job(folder, **{"model.chat_template": endless.replace("<|im_start|>", "")})
    prepared = prepare_locally(plain, [Record(source="t", position=0, messages=DIALOGUE)], str(tmp_path / "plain"))
    assert prepared.accepted == 1
