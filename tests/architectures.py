"""Tiny random models of the decoder families that people tune, each with what sets its family apart switched on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from itune_ray.config.train import TrainJob
from itune_ray.train.loop import train_local
from itune_ray.train.outcome import TrainOutcome

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 16
"""Of sliding layers: shorter than the tests' packed rows and their longer documents."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2"},  # biases on queries, keys and values
    "qwen3": {"model_type": "qwen3"},  # normed queries and keys
    "gemma3": {  # windowed layers and one global one, with rotary frequencies of their own
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 100000.0}},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "tie_word_embeddings": False},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.1,
    },
}
"""Family -> its config's own fields."""
WINDOWED = ("gemma3", "mistral")


def family(name: str, folder: Path) -> Path:
    """A random model of a family with the tests' tokenizer, as a Hugging Face folder."""
    words = tiny.tokenizer()
    fields = {**tiny.shape(words), "vocab_size": 384, **FAMILIES[name]}  # real ones have room beyond the tokenizer too
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    tiny.spread(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def lora_job(folder: Path, **overrides: Any) -> TrainJob:
    """LoRA over packed rows, fast enough that three steps move what the model says; with the export gate."""
    settings = {"steps": 3, "batch": 12, "packing": True, "pack_length": 128, "micro_batch": 2}
    settings |= {"model.peft": {"type": "lora", "rank": 4}, "optimizer": {"type": "adamw", "lr": 0.01}}
    return tiny.job(folder, **{**settings, "gate": {"prompts": 4}, **overrides})


@dataclass(frozen=True)
class Training:
    """A finished training of a family."""

    folder: Path
    """The base model."""
    job: TrainJob
    outcome: TrainOutcome
    stage: str


class Trainings:
    """One training per family, made when first asked for.

    Args:
        new_folder: Makes a folder of a name.
    """

    def __init__(self, new_folder: Callable[[str], Path]):
        self._new_folder, self._made = new_folder, dict[str, Training]()

    def __call__(self, name: str) -> Training:
        if name not in self._made:
            torch.set_num_threads(1)
            folder, stage = family(name, self._new_folder(name)), str(self._new_folder(f"{name}-stage"))
            job = lora_job(folder)
            self._made[name] = Training(folder, job, train_local(job, tiny.chats(24), stage), stage)
        return self._made[name]


SEEING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The tests' chat template, as image-text models take chats: contents are lists of parts."""


def llava(folder: Path) -> Path:
    """A random LLaVA: a CLIP tower of 28 × 28 pixels (4 image tokens), a projector, a two-layer Llama, a processor."""
    from transformers import (
        AutoModelForImageTextToText,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    words = tiny.tokenizer(SEEING)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>"]})
    wide = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, image_size=28, patch_size=14, **wide)
    text = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_key_value_heads=1, max_position_embeddings=256, **wide
    )
    image_id = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pixels,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=SEEING,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def idefics3(folder: Path) -> Path:
    """A random Idefics3: pictures cut into tiles of 56 × 56 pixels (4 tokens each) with tokens of their own between
    them, so that their size decides how many tokens a picture is; a connector, a two-layer Llama, a processor."""
    from transformers import (
        AutoModelForImageTextToText,
        Idefics3Config,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        Idefics3VisionConfig,
        LlamaConfig,
    )

    words = tiny.tokenizer(SEEING)
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    words.add_special_tokens({"additional_special_tokens": marks})
    wide = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = Idefics3VisionConfig(hidden_size=32, intermediate_size=48, image_size=56, patch_size=14, **wide)
    text = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_key_value_heads=1, max_position_embeddings=256, **wide
    )
    config = Idefics3Config(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
    )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    Idefics3Processor(pixels, words, image_seq_len=4, chat_template=SEEING).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
