"""Memory of a training step with a large vocabulary: `python -m itune_ray.bench.head fused|full TASK`, each way in a
process of its own. TASK is a file with the JSON of a `HeadTask`; the output ends in {peak_mib, seconds, loss}."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from itune_ray.model.logprobs import install_fused_head


class Way(NamedTuple):
    """A way to the loss."""

    install: Callable[[Any], None]
    """Done to the model once."""
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    """(model, ids, labels) -> mean loss over the labels."""


@dataclass(frozen=True)
class HeadTask:
    """One row of `tokens`, all supervised, through a Llama of one layer."""

    vocabulary: int
    tokens: int
    hidden: int
    threads: int

    @classmethod
    def read(cls, file: str) -> Self:
        """The task in a file."""
        return cls(**json.loads(Path(file).read_text()))

    def write(self, file: Path) -> None:
        """For `read`."""
        file.write_text(json.dumps(dataclasses.asdict(self)))


def measure(task: HeadTask, way: Way) -> dict[str, float]:
    """Peak memory of one forward and backward pass in bf16 over fp32 weights, beyond what the model itself takes."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=task.hidden,
        intermediate_size=2 * task.hidden,
        num_hidden_layers=1,
        num_attention_heads=task.hidden // 64,
        num_key_value_heads=task.hidden // 64,
        max_position_embeddings=task.tokens,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    way.install(model)
    ids = torch.randint(0, task.vocabulary, (1, task.tokens))
    with torch.autocast("cpu", torch.bfloat16):  # kernels and threads come into being
        way.loss(model, ids[:, :8], ids[:, :8]).backward()
    model.zero_grad(set_to_none=True)
    held = forget_peak()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = way.loss(model, ids, ids)
    loss.backward()
    seconds = time.perf_counter() - began
    return {
        "peak_mib": round((peak() - held) / 2**20, 1),
        "seconds": round(seconds, 2),
        "loss": float(loss.detach()),
    }


def forget_peak() -> int:
    """Bytes in memory now, from which the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes in memory since the last `forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _fused_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return -model(input_ids=ids, labels=labels, token_scores=True, use_cache=False).log_probs.mean()


def _full_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels, use_cache=False).loss


WAYS = {"fused": Way(install_fused_head, _fused_loss), "full": Way(lambda model: None, _full_loss)}
"""Our head, and transformers' own loss over all logits."""

if __name__ == "__main__":
    print(json.dumps(measure(HeadTask.read(sys.argv[2]), WAYS[sys.argv[1]])))
