import pytest
import tiny

from itune_ray.data.chat import ChatRenderer, NoAnswer, NoSupervisedTokens, TemplateRefused, TemplateRewritesHistory
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError

DIALOGUE = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "apple?"},
    {"role": "assistant", "content": "river stone"},
    {"role": "user", "content": "cloud?"},
    {"role": "assistant", "content": "\n\nmaple"},
)


def supervised_text(renderer: ChatRenderer, messages=DIALOGUE, supervise="assistant") -> str:
    ids, mask = renderer.training_ids(messages, supervise)
    return renderer.tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED])
def test_ids_equal_the_tokenizers_own_rendering(template):
    renderer = ChatRenderer(tiny.tokenizer(template))
    own = renderer.tokenizer.apply_chat_template(list(DIALOGUE))["input_ids"]
    assert renderer.training_ids(DIALOGUE).input_ids == own
    prompt = renderer.tokenizer.apply_chat_template(list(DIALOGUE[:4]), add_generation_prompt=True)["input_ids"]
    assert renderer.prompt_ids(DIALOGUE[:4]) == prompt


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED])
def test_the_answers_and_their_end_of_turn_are_supervised(template):
    renderer = ChatRenderer(tiny.tokenizer(template))
    text = supervised_text(renderer)
    # The tokenizer merges the prompt's newline with the answer's; the token that straddles belongs to the answer.
    assert text.replace("\n", "") == "river stone<|im_end|>maple<|im_end|>"


def test_only_the_last_answer_on_request():
    for template in (tiny.CHATML, tiny.MARKED):
        renderer = ChatRenderer(tiny.tokenizer(template))
        assert supervised_text(renderer, supervise="last_assistant").strip() == "maple<|im_end|>"


def test_everything_on_request():
    renderer = ChatRenderer(tiny.tokenizer())
    ids, mask = renderer.training_ids(DIALOGUE, "all")
    assert all(mask)
    assert len(ids) == len(mask)


def test_markers_that_leave_out_the_end_of_turn_still_teach_it():
    template = tiny.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert template != tiny.MARKED
    assert supervised_text(ChatRenderer(tiny.tokenizer(template))).count("<|im_end|>") == 2


def test_a_template_that_rewrites_history_is_refused_with_its_reason():
    renderer = ChatRenderer(tiny.tokenizer(tiny.REWRITING))
    with pytest.raises(TemplateRewritesHistory) as error:
        renderer.training_ids(DIALOGUE)
    assert error.value.reason == "template_rewrites_history"
    assert "supervise=last_assistant" in str(error.value)
    assert "maple<|im_end|>" in supervised_text(renderer, supervise="last_assistant")


def test_prompt_plus_answer_equals_the_training_ids():
    renderer = ChatRenderer(tiny.tokenizer())
    ids, mask = renderer.training_ids(DIALOGUE[:3])
    assert ids[: mask.index(True)] == renderer.prompt_ids(DIALOGUE[:2])


@pytest.mark.parametrize("messages", [DIALOGUE[:2], (*DIALOGUE[:2], {"role": "assistant", "content": "  "})])
def test_no_answer(messages):
    with pytest.raises(NoAnswer) as error:
        ChatRenderer(tiny.tokenizer()).training_ids(messages)
    assert error.value.reason == "no_answer"


def test_no_supervised_tokens():
    silent = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(NoSupervisedTokens):
        ChatRenderer(tiny.tokenizer(silent)).training_ids(DIALOGUE)


def test_a_template_that_raises_is_a_reason_not_a_crash():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        ChatRenderer(tiny.tokenizer(strict)).training_ids(DIALOGUE)


def test_text_rows_get_bos_and_eos_and_are_supervised_whole():
    renderer = ChatRenderer(tiny.tokenizer())
    ids, mask = renderer.record_ids(Record(source="t", position=0, text="apple river"))
    assert renderer.tokenizer.decode(ids) == "<s>apple river<|im_end|>"
    assert all(mask)


def test_a_template_may_be_given_as_text_or_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(tiny.CHATML)
    bare = tiny.tokenizer(None)
    with pytest.raises(ConfigError, match="no chat template"):
        ChatRenderer(bare).prompt_ids(DIALOGUE)
    by_text = ChatRenderer(tiny.tokenizer(None), tiny.CHATML)
    by_file = ChatRenderer(tiny.tokenizer(None), str(file))
    assert by_text.prompt_ids(DIALOGUE) == by_file.prompt_ids(DIALOGUE)
    assert by_text.template_hash == by_file.template_hash
    with pytest.raises(ConfigError, match="neither Jinja nor a file"):
        ChatRenderer(bare, str(tmp_path / "missing.jinja"))
