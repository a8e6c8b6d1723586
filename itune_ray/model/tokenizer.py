"""Tokenizers by transformers' Auto class, apart from models: who only renders rows loads no model code."""

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.errors import ModelError, first_line


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; raises `ModelError` when there is none that works."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"no usable tokenizer: {first_line(error)}", got=folder, knob="model.tokenizer") from None
