"""TRL's side of `itune bench jobs/bench/train.yaml`: SFTTrainer, packed, or DPOTrainer, with the settings that make it
fastest on a CPU (bf16 autocast, no gradient checkpointing, reference log-probabilities ahead of training).

`python jobs/bench/train_trl.py TASK` takes turns as `itune_ray.bench.turns` says; an order names the rows per forward
pass, and accumulation follows, so that a step's tokens stay the same. `python jobs/bench/train_trl.py --head TASK`
measures TRL's fused head as `itune_ray.bench.head` says.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from itune_ray.bench.head import HeadTask, Way, measure
from itune_ray.bench.turns import Order, Task, Work


def arguments(task: Task, micro_batch: int, out: str) -> dict[str, Any]:
    """What both trainers are given."""
    per_step = task.documents_per_step if task.method == "dpo" else task.rows_per_step
    return {
        "output_dir": out,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": max(1, per_step // micro_batch),
        "max_steps": task.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": task.precision == "bf16",
        "use_cpu": True,
        "optim": "adamw_torch_fused",
        "torch_compile": task.peer_compile,
        "max_length": task.pack_length,
        "logging_steps": task.steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def adapter(task: Task) -> LoraConfig | None:
    """LoRA over the same matrices as ours."""
    if task.method != "lora":
        return None
    return LoraConfig(
        r=task.rank, lora_alpha=2 * task.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def trainer(task: Task, micro_batch: int, out: str) -> Any:
    """A fresh trainer over a fresh model: fp32 weights, or a frozen base in the compute dtype."""
    words = AutoTokenizer.from_pretrained(f"{task.folder}/model")
    words.chat_template = None
    frozen = task.method == "lora" and task.precision == "bf16"
    dtype = torch.bfloat16 if frozen else torch.float32
    model = AutoModelForCausalLM.from_pretrained(f"{task.folder}/model", dtype=dtype, attn_implementation="sdpa")
    lines = (Path(task.folder) / "documents.jsonl").read_text().splitlines()
    data = Dataset.from_list([json.loads(line) for line in lines])
    settings = arguments(task, micro_batch, out)
    if task.method == "dpo":
        config = DPOConfig(**settings, beta=0.1, precompute_ref_log_probs=True)
        return CountingDpo(model=model, args=config, train_dataset=data, processing_class=words)
    config = SFTConfig(**settings, packing=True)
    return CountingSft(model=model, args=config, train_dataset=data, processing_class=words, peft_config=adapter(task))


class Counting:
    """Counts tokens, and sums the losses of a step's forward passes, which add up to the step's loss."""

    seen = 0
    loss: Any = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass."""
        mask = inputs.get("attention_mask")
        self.seen += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        parent: Any = super()
        loss = parent.training_step(model, inputs, *args, **kwargs)
        self.loss = self.loss + loss
        return loss


class CountingSft(Counting, SFTTrainer):
    """TRL's own, counted."""


class CountingDpo(Counting, DPOTrainer):
    """TRL's own, counted."""


class Turns(TrainerCallback):
    """Ends a turn where it should, and the training where the next turn wants other settings."""

    def __init__(self, work: Work, order: Order):
        self._work, self.order, self._told = work, order, 0
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step is done."""
        told, self._told = self.trainer.seen - self._told, self.trainer.seen
        loss, self.trainer.loss = float(self.trainer.loss), 0.0
        following = self._work.step(told, loss)
        if following is None:
            return
        changed = following.micro_batch != self.order.micro_batch
        self.order = following
        control.should_training_stop = changed


def main(file: str) -> None:
    """Take turns until none is asked for."""
    task = Task.read(file)
    torch.set_num_threads(task.threads)
    work = Work()
    order = work.ready()
    with contextlib.suppress(EOFError):
        while order is not None:
            with tempfile.TemporaryDirectory() as out:
                turns = Turns(work, order)
                turns.trainer = trainer(task, order.micro_batch or 1, out)
                turns.trainer.remove_callback(PrinterCallback)
                turns.trainer.add_callback(turns)
                turns.trainer.train()
            order = turns.order


def fused_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss by TRL's fused head."""
    return model(input_ids=ids, labels=labels, fused_lm_head=True).loss


if __name__ == "__main__":
    if sys.argv[1] == "--head":
        print(json.dumps(measure(HeadTask.read(sys.argv[2]), Way(add_fused_lm_head, fused_loss))))
    else:
        main(sys.argv[1])
