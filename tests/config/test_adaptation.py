"""The table of parameter-efficient methods, in the docs and in the schemas."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from itune_ray.config.adaptation import STRATEGY_NAMES, SUPPORT, PeftConfig, PeftMethod, refusal, support_table
from itune_ray.config.strategies import DdpConfig, DeepspeedConfig, Fsdp2Config
from itune_ray.config.train import TrainJob

DOCS = Path(__file__).parents[2] / "docs" / "peft.md"


def test_the_page_holds_the_table_of_the_code():
    assert support_table() in DOCS.read_text(), "put the output of support_table() into docs/peft.md"


def test_every_name_of_the_table_is_a_config_and_every_config_has_its_row():
    union = PeftConfig.__origin__.__args__  # type: ignore[attr-defined]
    names = {str(kind.model_fields["type"].default) for kind in union} - {"peft"}
    library = {name.lower() for name in PeftMethod.__args__}  # type: ignore[attr-defined]
    assert names | library | {"rslora", "dora", "l_tuning_prompt"} == SUPPORT.keys()


def test_variants_have_rows_of_their_own():
    parse = TypeAdapter(PeftConfig).validate_python
    assert parse({"type": "lora"}).name == "lora"
    assert parse({"type": "lora", "rslora": True}).name == "rslora"
    assert parse({"type": "lora", "rslora": True, "dora": True}).name == "dora"
    assert parse({"type": "peft", "method": "IA3"}).name == "ia3"
    labelled = {"type": "l_tuning", "labels": ["a", "b"]}
    assert parse({**labelled, "form": "prompt"}).name == "l_tuning_prompt"
    assert parse(labelled).identity() == {**labelled, "tokens": 4, "hidden": 128}


@pytest.mark.parametrize("method", SUPPORT)
def test_some_strategy_trains_every_method(method):
    assert set(SUPPORT[method].refused) < set(STRATEGY_NAMES)
    assert "ddp" not in SUPPORT[method].refused


def test_a_refusal_says_method_strategy_reason_and_the_way_out():
    qlora = TypeAdapter(PeftConfig).validate_python({"type": "qlora"})
    told = refusal(qlora, Fsdp2Config())
    assert told is not None
    assert "method qlora cannot be trained with strategy fsdp2" in told
    assert told.endswith("set strategy to one of ddp, zero1, zero2")
    assert refusal(qlora, DdpConfig()) is None
    assert refusal(qlora, DeepspeedConfig(stage=2)) is None


@pytest.mark.parametrize("method", ["qlora", "houlsby", "adalora"])
def test_only_lora_is_continued(method):
    with pytest.raises(ValidationError, match=r"model\.peft\.type=lora"):
        TrainJob.model_validate(
            {
                "name": "n",
                "model": {"path": "m", "peft": {"type": method}, "adapter": "a"},
                "data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}],
                "strategy": {"type": "ddp"},
                "steps": 1,
            }
        )


def test_a_sweep_serves_adapters_alone():
    """DoRA's adapters are LoRA by type, and vLLM refuses them."""
    assert [name for name, support in SUPPORT.items() if support.route == "adapter"] == ["lora", "rslora"]
