"""The renderer of a served model, as its engine renders: for whoever must know tokens before asking."""

from functools import lru_cache

from itune_ray.config.shared import ModelRef
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.hub import resolve


def model_renderer(ref: ModelRef) -> ChatRenderer:
    """The renderer of a model by its tokenizer and chat template; one per process and model."""
    return _renderer(ref.model_dump_json(exclude={"adapter"}))


@lru_cache(maxsize=8)
def _renderer(ref_json: str) -> ChatRenderer:
    from itune_ray.model.tokenizer import load_tokenizer  # seconds, and most who import this never render

    ref = ModelRef.model_validate_json(ref_json)
    folder = resolve(ref.tokenizer or ref.path, revision=None if ref.tokenizer else ref.revision, kind="tokenizer")
    return ChatRenderer(load_tokenizer(folder.path, ref.trust_remote_code), ref.chat_template, ref.thinking)
