"""A Llama with random weights for the benches: `python jobs/bench/random_llama.py FOLDER [tokenizer]`.

20.7 M parameters: hidden 384, intermediate 1,024, 13 layers, 6 heads, 2 kv heads, tied. The tokenizer is that of a
model folder, by default stories260K of $ITUNE_TEST_DATA (default ../shared).
"""

import os
import sys
from pathlib import Path

import torch

from itune_ray.config.train import InitConfig
from itune_ray.model.load import new_model
from itune_ray.model.tokenizer import load_tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 13,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TOKENIZER = Path(os.environ.get("ITUNE_TEST_DATA", "../shared")) / "models" / "stories260K"


def main(folder: str, tokenizer_folder: str = str(TOKENIZER)) -> None:
    """Write the model, and say how large it is."""
    tokenizer = load_tokenizer(tokenizer_folder)
    init = InitConfig(tokenizer=tokenizer_folder, config=CONFIG)
    model = new_model(init, tokenizer, seed=7, dtype=torch.float32, attention="sdpa")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
