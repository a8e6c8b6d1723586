"""Pruning against masking, and importance against finite differences, in models small enough to be exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from itune_ray.compress.blocks import blocks_of, shape_of
from itune_ray.compress.calibration import calibrate_on
from itune_ray.compress.importance import Scores, row_losses
from itune_ray.compress.methods.structured import choose, kept_counts, smaller_model
from itune_ray.compress.pruner import Pruner
from itune_ray.config.compress import CalibrationConfig, CompressJob, StructuredConfig
from itune_ray.data.batches import collate
from itune_ray.data.chat import ChatRenderer
from itune_ray.errors import CompressError

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 340,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama with grouped queries": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4},
    "llama": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2, biases": {"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen3, norms on q and k": {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4},
}


def model(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    arguments = {**SHAPE, **{k: v for k, v in settings.items() if k != "model_type"}}
    config = AutoConfig.for_model(settings["model_type"], **arguments)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval()


def in_fp64_throughout(made: Any) -> Any:
    """transformers computes norms and eager softmax in fp32 whatever the weights are."""
    made.set_attn_implementation("sdpa")
    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon
            module.forward = lambda x, m=module, e=eps: m.weight * x * (x.square().mean(-1, keepdim=True) + e).rsqrt()
    return made


def batches(count: int = 10, size: int = 4) -> list[Any]:
    words = tiny.tokenizer()
    config = CalibrationConfig(data=({"type": "playground", "split": "chat", "rows": 1},), rows=count, micro_batch=size)
    return calibrate_on(tiny.chats(count), config, ChatRenderer(words), words.pad_token_id, seed=0).batches


def scores(made: Any, groups: list[Any], importance: str = "gate_gradient") -> Scores:
    found = Scores(made, blocks_of(made), shape_of(made), importance)  # type: ignore[arg-type]
    for batch in groups:
        found.add(batch)
    return found


def masked(made: Any, kept: Any) -> Any:
    """Hooks that silence what pruning would remove; returns their handles."""
    shape, handles = shape_of(made), []
    for layer, block in enumerate(blocks_of(made)):
        heads = torch.zeros(shape.kv_heads, shape.group, shape.head_dim)
        heads[kept.kv_heads[layer]] = 1
        channels = torch.zeros(shape.channels)
        channels[kept.channels[layer]] = 1
        for module, mask in ((block.attention.o_proj, heads.flatten()), (block.mlp.down_proj, channels)):
            handles.append(module.register_forward_pre_hook(lambda _, inputs, m=mask: (inputs[0] * m,)))
    return handles


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_logits_equal_the_masked_originals(family):
    made = model(FAMILIES[family])
    found = scores(made, batches())
    kept = choose(found.heads, found.channels, shape_of(made), StructuredConfig(sparsity=0.25))
    ids = torch.randint(0, 340, (2, 20), generator=torch.Generator().manual_seed(1))
    small = smaller_model(made, blocks_of(made), shape_of(made), kept).eval()
    assert shape_of(small).kv_heads == 3
    assert shape_of(small).channels == 36
    handles = masked(made, kept)
    with torch.no_grad():
        wanted, got = made(ids).logits, small(ids).logits
    for handle in handles:
        handle.remove()
    assert float((got - wanted).abs().max()) < 1e-5
    with torch.no_grad():
        assert float((made(ids).logits - wanted).abs().max()) > 0.1, "the mask must matter"


def test_a_llama_that_refuses_the_head_count_becomes_its_equivalent():
    made = model(FAMILIES["llama"])
    found = scores(made, batches())
    kept = choose(found.heads, found.channels, shape_of(made), StructuredConfig(sparsity=0.25))
    small = smaller_model(made, blocks_of(made), shape_of(made), kept)
    assert small.config.model_type == "mistral"
    assert small.config.sliding_window is None
    assert small.get_input_embeddings().weight is small.get_output_embeddings().weight


def test_gate_gradient_is_the_derivative_of_a_gate():
    """Central difference in fp64 of one row's loss by a gate on one head."""
    made = in_fp64_throughout(model(FAMILIES["llama with grouped queries"], torch.float64))
    (batch,) = batches(1, 1)
    importance = scores(made, [batch]).heads
    shape, block, step = shape_of(made), blocks_of(made)[1], 1e-4
    for head in range(shape.heads):
        losses = []
        for gate in (1 + step, 1 - step):
            factor = torch.ones(shape.heads, shape.head_dim, dtype=torch.float64)
            factor[head] = gate
            hook = block.attention.o_proj.register_forward_pre_hook(lambda _, x, f=factor: (x[0] * f.flatten(),))
            with torch.no_grad():
                losses.append(float(row_losses(made, batch)))
            hook.remove()
        difference = abs(losses[0] - losses[1]) / (2 * step)
        assert importance[1, head].item() == pytest.approx(difference, rel=1e-6, abs=1e-10)


def test_importance_does_not_depend_on_how_rows_are_batched():
    made = model(FAMILIES["qwen3, norms on q and k"], torch.float64)
    one, four = scores(made, batches(9, 1)), None
    heads, channels = one.heads, one.channels
    four = scores(made, batches(9, 4))
    torch.testing.assert_close(four.heads, heads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(four.channels, channels, rtol=1e-9, atol=1e-12)


def test_the_absolute_value_is_per_row_and_the_printed_equation_is_another_statistic():
    made = model(FAMILIES["llama"], torch.float64)
    rows = batches(4, 1)
    together = scores(made, batches(4, 4)).heads
    apart = sum(scores(made, [row]).heads for row in rows) / 4
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)
    printed = scores(made, rows, "taylor_abs").heads
    assert (printed >= together).all()
    assert not torch.allclose(printed, together)


def test_ties_keep_the_first():
    shape = shape_of(model(FAMILIES["llama"]))
    kept = choose(torch.ones(2, 4), torch.zeros(2, 48), shape, StructuredConfig(sparsity=0.5))
    assert kept.kv_heads == [[0, 1], [0, 1]]
    assert kept.channels == [list(range(24))] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.3}, r"0.3 of 4 key-value heads is 1.2 heads; got 0.3; allowed: 0, 0.25, 0.5, 0.75; set by"),
        ({"sparsity": 0.25, "channels": 0.99}, "no MLP channel would be left of 48"),
        ({"sparsity": 0.5, "channel_multiple": 64}, "no MLP channel would be left of 48"),
    ],
)
def test_what_no_count_allows_is_one_line(settings, message):
    with pytest.raises(CompressError, match=message):
        kept_counts(StructuredConfig(**settings), shape_of(model(FAMILIES["llama"])))


def test_channels_are_kept_in_multiples():
    shape = shape_of(model(FAMILIES["llama"]))
    assert kept_counts(StructuredConfig(sparsity=0.25, channel_multiple=8), shape) == (3, 40)


def test_other_architectures_are_refused_by_what_they_have():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=2, n_layer=2, vocab_size=50, n_positions=32)
    with pytest.raises(CompressError, match=r"0 such attentions and 0 such MLPs in 2 layers; got 'GPT2LMHeadModel"):
        blocks_of(AutoModelForCausalLM.from_config(config))


def job(folder: Path, **method: Any) -> CompressJob:
    return CompressJob.model_validate(
        {
            "name": "c",
            "model": {"path": str(folder)},
            "method": {"type": "structured", **method},
            "calibration": {"data": [{"type": "playground", "split": "chat", "rows": 1}], "rows": 12, "micro_batch": 5},
        }
    )


def pruned(folder: Path, out: Path, **method: Any) -> dict[str, Any]:
    pruner = Pruner(job(folder, **method), tiny.chats(20))
    for index in range(pruner.prepare()):
        pruner.measure(index)
    return pruner.cut(str(out))


def test_a_folder_in_a_smaller_folder_out(tmp_path):
    folder = tiny.llama(tmp_path / "llama", num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    facts = pruned(folder, tmp_path / "small", sparsity=0.25)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    large = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after = sum(p.numel() for p in small.parameters())
    assert facts["parameters"]["after"]["total"] == after
    assert facts["parameters"]["before"]["total"] == sum(p.numel() for p in large.parameters())
    assert facts["parameters"]["removed_share"] == pytest.approx(1 - after / facts["parameters"]["before"]["total"])
    for side in ("before", "after"):
        parts = facts["parameters"][side]
        assert parts["total"] == sum(parts[name] for name in ("embedding", "attention", "mlp", "norm", "head"))
    assert json.dumps(facts)
    assert (tmp_path / "small" / "tokenizer.json").exists()
    again = pruned(folder, tmp_path / "again", sparsity=0.25)
    assert again == facts
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "again")]
    assert weights[0] == weights[1]


def test_sparsity_zero_gives_the_model_back(tmp_path):
    folder = tiny.llama(tmp_path / "llama")
    pruned(folder, tmp_path / "same", sparsity=0.0)
    large, same = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "same"))
    for name, tensor in large.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_rows_without_an_answer_are_no_calibration(tmp_path):
    folder = tiny.llama(tmp_path / "llama")
    prompts = [tiny.chat("apple?", "", position=i) for i in range(3)]
    with pytest.raises(CompressError, match=r"no calibration row has an answer that fits; got \{'no_answer': 3\}"):
        Pruner(job(folder, sparsity=0.0), prompts).prepare()


def test_an_odd_collate_never_pads_into_a_row():
    (batch,) = batches(3, 3)
    assert batch.num_segments == (1, 1, 1)
    assert collate([], 0).num_supervised == 0
