"""The renderer of a training, apart from its model: the driver loads no more than a tokenizer."""

from itune_ray.config.train import TrainedModel
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.hub import ResolvedModel, resolve
from itune_ray.model.added_tokens import add_tokens
from itune_ray.model.tokenizer import load_tokenizer


def load_renderer(model: TrainedModel, sees: bool = False) -> ChatRenderer:
    """The tokenizer with the chat template in force."""
    tokenizer = load_tokenizer(tokenizer_folder(model).path, model.trust_remote_code)
    add_tokens(tokenizer, model.added_tokens)
    return ChatRenderer(tokenizer, model.chat_template, model.thinking, sees)


def tokenizer_folder(model: TrainedModel) -> ResolvedModel:
    """Where the tokenizer is: named by itself, by `init`, or beside the weights."""
    if model.tokenizer is not None:
        return resolve(model.tokenizer, kind="tokenizer")
    if model.init is not None:
        return resolve(model.init.tokenizer, kind="tokenizer")
    assert model.path is not None
    return resolve(model.path, revision=model.revision, kind="tokenizer")
