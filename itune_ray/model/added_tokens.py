"""Tokens that a job adds to a model, e.g. task tokens (methods D39, T18): to its tokenizer and to its embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Make each text one token, wherever it stands. They are no special tokens: rows may hold them, and decoding keeps
    them. What the vocabulary has stays as it is."""
    added: Any = [AddedToken(token, normalized=False) for token in tokens]
    tokenizer.add_tokens(added)


def embed_new_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give tokens that the model has never seen their rows in its embeddings, and in its head where that has a matrix
    of its own: the mean of all other tokens' rows. The tables grow only where the tokens go beyond them."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vocabulary = tokenizer.get_vocab()
    fresh = [vocabulary[token] for token in tokens]
    known = sorted(set(vocabulary.values()) - set(fresh))
    tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t}
    with torch.no_grad():
        for weight in tables.values():
            weight[fresh] = weight[known].float().mean(dim=0).to(weight.dtype)
