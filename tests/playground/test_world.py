"""The built-in world: its parser inverts its writer, its splits do not overlap, its graders are exact."""

import re
from pathlib import Path

import pytest

from itune_ray.errors import ConfigError
from itune_ray.playground.families import BY_NAME, FAMILIES, REFUSAL
from itune_ray.playground.parser import grade, parse
from itune_ray.playground.sets import rows
from itune_ray.playground.words import CLOSED, is_test

MODELS = Path(__file__).parents[2] / "itune_ray" / "playground" / "models"
CHATS = ("chat", "test", "test_paraphrase")


def prompt_of(record):
    return record.messages[0]["content"]


def test_there_are_enough_families_languages_and_wordings():
    assert len(FAMILIES) >= 20
    assert {family.language for family in FAMILIES} == {"en", "fr", "es"}
    for family in FAMILIES:
        assert family.held or family.style == "how", f"{family.name} has no held-out wording"
        assert not set(family.seen) & set(family.held)


@pytest.mark.parametrize("split", CHATS)
def test_the_parser_inverts_every_instruction(split):
    seen = set()
    for record in rows(split, 3000, seed=9):
        parsed = parse(prompt_of(record))
        assert parsed is not None, prompt_of(record)
        assert (parsed.family, parsed.answer) == (record.meta["family"], record.response)
        seen.add(parsed.family)
    assert seen == set(BY_NAME)


def test_the_grader_takes_the_answer_and_nothing_else():
    for record in rows("test", 400, seed=1):
        prompt, answer = prompt_of(record), record.response
        assert grade(prompt, f" {answer} ").correct
        assert not grade(prompt, answer + "x").correct
        assert not grade(prompt, "").correct
        assert grade(prompt, REFUSAL).correct == (record.meta["family"] == "refuse")
    assert grade("sing me a song about the sea", "la la").family is None


def test_no_test_instance_can_be_in_training():
    trained = [parse(prompt_of(r)) for split in ("chat", "prompts", "manual") for r in rows(split, 4000, seed=3)]
    trained_args = {(p.family, tuple(sorted(p.args.items()))) for p in trained}
    for split in ("test", "test_paraphrase"):
        for record in rows(split, 1500, seed=4):
            parsed = parse(prompt_of(record))
            if parsed.family not in CLOSED:
                assert (parsed.family, tuple(sorted(parsed.args.items()))) not in trained_args


def test_arguments_are_split_for_good():
    shares = [is_test("reverse", (f"w{i}",)) for i in range(4000)]
    assert 0.09 < sum(shares) / len(shares) < 0.16


def wording(prompt):
    """The instruction with its arguments taken out."""
    for name, value in sorted(parse(prompt).args.items()):
        prompt = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", f"<{name}>", prompt, count=1)
    return prompt


def test_held_out_wordings_are_in_no_training_chat():
    trained = {wording(prompt_of(r)) for split in ("prompts", "manual") for r in rows(split, 6000, seed=5)}
    held = {wording(prompt_of(r)) for r in rows("test_paraphrase", 2000, seed=5)}
    assert len(held) > 200
    assert not trained & held


def test_running_text_holds_no_chat():
    for record in rows("raw", 2000, seed=6):
        assert record.text
        assert not record.messages
        assert "<|" not in record.text


def test_prompts_hold_no_answer():
    for record in rows("prompts", 200, seed=6):
        assert record.response is None
        assert "answer" not in record.meta


def test_manual_rows_are_rated_and_the_bad_ones_badly():
    good, bad = [], []
    for record in rows("manual", 600, seed=7):
        mean = sum(r["value"] for r in record.meta["ratings"]) / len(record.meta["ratings"])
        (good if grade(prompt_of(record), record.response).correct else bad).append(mean)
    assert bad
    assert max(bad) < 4 <= min(good)


def test_rows_do_not_depend_on_how_many_are_asked_for():
    assert list(rows("chat", 50, seed=8)) == list(rows("chat", 80, seed=8))[:50]
    assert list(rows("chat", 50, seed=8)) != list(rows("chat", 50, seed=9))


def test_options_are_refused_by_name():
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        next(rows("chat", 1, options={"weight": {}}))
    with pytest.raises(ConfigError, match="did you mean 'reverse'"):
        next(rows("chat", 1, options={"weights": {"revers": 2}}))


def test_unsafe_requests_and_safe_look_alikes_share_their_words():
    words = {
        family: {
            word for r in rows("chat", 4000, seed=2) if r.meta["family"] == family for word in prompt_of(r).split()
        }
        for family in ("refuse", "safe")
    }
    for word in ("steal", "kill", "blow", "break", "hack", "shoot", "stab"):
        assert word in words["refuse"] & words["safe"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from itune_ray.playground.tokenizer import build

    return build(tmp_path_factory.mktemp("tokenizer"))


def test_the_tokenizer_is_lossless_and_knows_every_character(tokenizer):
    texts = [r.text for r in rows("raw", 600, seed=1)]
    texts += [f" {m['content']}" for split in CHATS for r in rows(split, 400, seed=1) for m in r.messages]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_the_shipped_tokenizer_is_the_built_one(tokenizer):
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(MODELS / "tokenizer")
    assert shipped.get_vocab() == tokenizer.get_vocab()
    chat = [{"role": "user", "content": "reverse abc"}, {"role": "assistant", "content": "cba"}]
    assert shipped.apply_chat_template(chat, tokenize=False) == (
        "<|bos|><|user|> reverse abc<|end|><|assistant|> cba<|end|>"
    )


def test_the_shipped_models_load_and_are_small():
    from transformers import AutoModelForCausalLM

    total = sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file())
    assert total <= 10 * 2**20
    for name in ("base", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(MODELS / name)
        assert model.config.model_type == "llama"
        assert model.config.head_dim == 32
