"""The fused head: per-token scores from inside `model.forward`, without the [T, V] logits.

With V = 128,256 and T = 4,096 the fp32 logits alone are 2 GiB, and their softmax and gradient as much again. Only
positions that have a target are scored, in chunks; the backward pass recomputes each chunk's logits. It happens inside
`forward`, because FSDP2 has the head's weights gathered only there.

With hidden states h [N, H], head W [V, H], z = h Wᵀ:
    log p_n = z[n, y_n] - lse(z_n)            d log p_n / dz = onehot(y_n) - p
    entropy_n = lse(z_n) - Σ_v p_v z_v        d entropy_n / dz_v = -p_v (log p_v + entropy_n)
and, for distillation, at K given tokens and for all others together:
    at_nk = z[n, i_nk] - lse(z_n)             d at_nk / dz = onehot(i_nk) - p
    tail_n = lse(z_n over v not in i_n) - lse(z_n)
                                              d tail_n / dz_v = [v not in i_n] p_v / exp(tail_n) - p_v
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from itune_ray.errors import ModelError
from itune_ray.model.cpu import wide
from itune_ray.model.pooling import Pooled
from itune_ray.model.router import RouterLoad, router_load

CHUNK_ELEMENTS = 2**24
"""Logits of one chunk on CPU: 64 MiB in fp32."""
CUDA_CHUNK_ELEMENTS = 2**27
"""The same on a GPU, 512 MiB: every chunk adds to the head's whole gradient in fp32, 1 GiB read and written at
V = 128,256; with small ones that is most of the time (170 ms for 8,192 tokens on an H100 against 34 ms dense)."""

ROW_MULTIPLE = 32
"""Scored positions are filled up to it on a CPU, which compiles a kernel for each new shape of its products in bf16."""
WIDENED_ELEMENTS = 2**22
"""Of a bf16 head that are widened to fp32 at a time: 16 MiB."""


class TokenScores(NamedTuple):
    """Scores of the N supervised tokens of a micro-batch, row after row, in the order of `labels[:, 1:] != -100`."""

    log_probs: Tensor
    """[N] fp32, nats, differentiable."""
    entropy: Tensor
    """[N] fp32, nats, of the predictive distribution, differentiable."""
    at: Tensor | None = None
    """[N, K] fp32 log-probabilities of the tokens that `score_ids` named, differentiable."""
    tail: Tensor | None = None
    """[N] fp32 log of the probability of all other tokens, differentiable; no difference of near ones is taken."""
    values: Tensor | None = None
    """[S] fp32 a scalar head's values at the places it was asked for, differentiable; a model that has one has no
    language-model head, and the other scores are empty."""
    router: RouterLoad | None = None
    """How a mixture of experts spread the micro-batch's tokens, where `router_tokens` asked for it."""
    pooled: Pooled | None = None
    """Means over each document, where `pool_at` asked for them (`itune_ray.model.pooling`)."""
    ids: Tensor | None = None
    """[N, K] int64 the likeliest tokens in their order, where `top_k` asked for them."""


class LogitTransform(NamedTuple):
    """What a family does to h Wᵀ: z = cap · tanh(scale · h Wᵀ / cap), or scale · h Wᵀ without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw if self.scale == 1.0 else raw * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def backward(self, grad: Tensor, z: Tensor) -> Tensor:
        """Gradient at h Wᵀ from the gradient at z."""
        if self.cap is not None:
            grad = grad * (1 - (z / self.cap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


IDENTITY = LogitTransform()


def install_fused_head(model: nn.Module) -> None:
    """Let `model(..., labels=labels, token_scores=True)` return `TokenScores`; without the flag nothing changes.

    `score_ids` [N, K] asks for the log-probabilities of K distinct tokens at each of the N supervised positions too,
    `top_k` for those of the K likeliest, which are named as well, and `router_tokens` [B, T] for the router load of the
    tokens it marks.

    Install it before PEFT wraps the model, and the model before it is sharded. The head and the backbone are looked
    up at each call, since both wrap them in place.
    """
    original: Callable[..., Any] = model.forward
    transform = _logit_transform(model)

    # The signature stays, since generate() checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        token_scores: bool = False,
        labels: Tensor | None = None,
        score_ids: Tensor | None = None,
        top_k: int | None = None,
        router_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not token_scores:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        if labels is None:
            raise ModelError("token scores need labels")
        routed = {} if router_tokens is None else {"output_router_logits": True}
        outputs = self.base_model(*args, **kwargs, **routed)
        hidden = outputs.last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        wanted = targets != -100
        head = self.get_output_embeddings()
        scores = score_tokens(hidden[wanted], targets[wanted], head, transform, score_ids, top_k)
        if router_tokens is None:
            return scores
        return scores._replace(router=router_load(self, outputs.router_logits, router_tokens))

    model.forward = MethodType(forward, model)


def score_tokens(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    transform: LogitTransform = IDENTITY,
    ids: Tensor | None = None,
    top_k: int | None = None,
) -> TokenScores:
    """Scores of targets [N], and of ids [N, K] or the `top_k` likeliest tokens, given hidden states [N, H] and the
    language-model head."""
    if type(head) is nn.Linear and head.bias is None:
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        count, missing = len(hidden), -len(hidden) % ROW_MULTIPLE
        if missing and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
            hidden, targets = pad(hidden, (0, 0, 0, missing)), pad(targets, (0, missing))
            ids = None if ids is None else pad(ids, (0, 0, 0, missing))
        scored: Any = _ChunkedScores.apply(hidden, head.weight, targets, transform, ids, top_k)
        # Copied, since FSDP2 hangs its backward on what a model returns, and a view would lose that in place.
        scores: Any = [s if s is None or len(s) == count else s[:count].clone() for s in scored]
        return TokenScores(*scores[:4], ids=scores[4])
    return _score_by_module(hidden, targets, head, transform, ids, top_k)


def _score_by_module(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    transform: LogitTransform,
    ids: Tensor | None,
    top_k: int | None,
) -> TokenScores:
    """Heads that are more than a matrix (adapters, trainable token rows, a bias): each chunk under checkpointing."""

    def chunk_scores(hidden: Tensor, targets: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
        log_p = transform(head(hidden).float()).log_softmax(-1)
        scores = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        asked = ids if top_k is None else _likeliest(log_p, top_k)
        if asked is None:
            return scores
        return (*scores, log_p.gather(-1, asked), _others(log_p, asked).logsumexp(-1), asked)

    rows = _rows_per_chunk(_num_words(head), hidden)
    ids_of_chunks = itertools.repeat(None) if ids is None else ids.split(rows)
    chunks = [
        checkpoint(chunk_scores, h, y, i, use_reentrant=False)
        for h, y, i in zip(hidden.split(rows), targets.split(rows), ids_of_chunks, strict=False)
    ]
    joined: Any = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return TokenScores(*joined[:4], ids=None if top_k is None else joined[4])


def _likeliest(log_p: Tensor, top_k: int) -> Tensor:
    """The k likeliest tokens [N, k] of log-probabilities [N, V]."""
    if top_k > log_p.shape[-1]:
        raise ModelError(
            "more of the likeliest tokens are asked for than the vocabulary has",
            got=top_k,
            allowed=f"at most {log_p.shape[-1]}",
            knob="objective.k",
        )
    return log_p.detach().topk(top_k).indices


def _others(scores: Tensor, ids: Tensor) -> Tensor:
    """Scores [N, V] with those of ids [N, K] taken out of every sum."""
    return scores.scatter(-1, ids, float("-inf"))


class _ChunkedScores(torch.autograd.Function):
    """The formulas of the module docstring, chunk by chunk; grad_W accumulates in fp32 (rounding every chunk's product
    to bf16 biases training). Where one chunk holds all, its probabilities are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        ids: Tensor | None,
        top_k: int | None,
    ) -> Any:
        head = _Head(hidden, weight)
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(log_probs)
        named = None if top_k is None else targets.new_empty(len(hidden), top_k)
        ids = ids if named is None else named
        at = None if ids is None else log_probs.new_empty(ids.shape)
        tail = None if ids is None else torch.empty_like(log_probs)
        chunks, kept = _chunks(hidden, weight.shape[0]), None
        for rows in chunks:
            log_p = transform(head.logits(hidden[rows])).log_softmax(-1)
            log_probs[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
            if named is not None and top_k is not None:
                named[rows] = _likeliest(log_p, top_k)
            if ids is not None and at is not None and tail is not None:
                at[rows] = log_p.gather(-1, ids[rows])
                tail[rows] = _others(log_p, ids[rows]).logsumexp(-1)
            p = log_p.exp()
            kept = p if len(chunks) == 1 and transform == IDENTITY else None
            entropy[rows] = -log_p.mul_(p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, entropy, ids, tail)
        ctx.transform, ctx.kept = transform, kept
        ctx.set_materialize_grads(False)
        return log_probs, entropy, at, tail, named

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        hidden, weight, targets, *_ = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # the gradient takes its place
        head = _Head(hidden, weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        others = any(grad is not None for grad in grads[1:])
        for rows in _chunks(hidden, weight.shape[0]):
            if kept is not None and grads[0] is not None and not others:
                grad = _target_gradient(kept, targets, grads[0])
            else:
                grad = _logit_gradient(ctx, head.logits(hidden[rows]), rows, grads[:4])
            if grad_hidden is not None:
                grad_hidden[rows] = head.hidden_gradient(grad)
            if grad_weight is not None:
                head.add_weight_gradient(grad_weight, grad, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _target_gradient(p: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """Σ grad_n d log p_n / dz [N, V] from the probabilities, in their place."""
    return p.mul_(-grad[:, None]).scatter_add_(-1, targets[:, None], grad[:, None])


def _logit_gradient(ctx: Any, raw: Tensor, rows: slice, grads: Sequence[Tensor | None]) -> Tensor:
    """Gradient at h Wᵀ of a chunk, from those of all scores."""
    grad_log_probs, grad_entropy, grad_at, grad_tail = grads
    _, _, targets, entropy, ids, tail = ctx.saved_tensors
    z = ctx.transform(raw)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    if grad_log_probs is None:
        grad = torch.zeros_like(z)
    else:
        free = p if all(other is None for other in grads[1:]) else p.clone()
        grad = _target_gradient(free, targets[rows], grad_log_probs[rows])
    if grad_entropy is not None:
        grad -= grad_entropy[rows, None] * p * (log_p + entropy[rows, None])
    if grad_at is not None:
        grad -= p * grad_at[rows].sum(-1, keepdim=True)
        grad.scatter_add_(-1, ids[rows], grad_at[rows])
    if grad_tail is not None:
        share = (_others(log_p, ids[rows]) - tail[rows, None]).exp().nan_to_num(0.0)  # no others: none
        grad += grad_tail[rows, None] * (share - p)
    return ctx.transform.backward(grad, z)


class _Head:
    """The three products with W [V, H], in the hidden states' dtype, or by fp32 units where those are faster
    (`itune_ray.model.cpu`): W is then used as it is, or widened some words at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self._wide = wide(hidden.device, hidden.dtype)
        self._dtype = torch.float32 if self._wide else hidden.dtype
        at_once = weight.dtype == self._dtype or not self._wide
        self._weight = weight.to(self._dtype) if at_once else weight
        num_words = weight.shape[0]
        size = num_words if at_once else max(1, WIDENED_ELEMENTS // weight.shape[1])
        self._words = [slice(start, min(start + size, num_words)) for start in range(0, num_words, size)]

    def logits(self, hidden: Tensor) -> Tensor:
        """h Wᵀ [N, V] fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [hidden.to(self._dtype) @ self._weight[words].to(self._dtype).T for words in self._words]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).float()

    def hidden_gradient(self, grad: Tensor) -> Tensor:
        """dh [N, H] from the gradient at h Wᵀ [N, V]."""
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(self._dtype)
            first, *rest = (grad[:, words] @ self._weight[words].to(self._dtype) for words in self._words)
            return sum(rest, first)

    def add_weight_gradient(self, total: Tensor, grad: Tensor, hidden: Tensor) -> None:
        """Add dW to its fp32 sum."""
        with torch.autocast(grad.device.type, enabled=False):
            if self._wide:
                total.addmm_(grad.T, hidden.float())
            else:
                total += grad.to(self._dtype).T @ hidden


def _chunks(hidden: Tensor, num_words: int) -> list[slice]:
    num_rows, size = len(hidden), _rows_per_chunk(num_words, hidden)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _rows_per_chunk(num_words: int, hidden: Tensor) -> int:
    return max(1, (CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS) // num_words)


def _num_words(head: nn.Module) -> int:
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else CHUNK_ELEMENTS // 64


def _logit_transform(model: Any) -> LogitTransform:
    """The family's scaling and soft cap, read from its config (Gemma, Cohere, Granite and Falcon-H1 have some)."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = next(
        (
            float(v)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (v := getattr(config, name, None)) is not None
        ),
        1.0,
    )
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale = float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
    return LogitTransform(scale, None if cap is None else float(cap))
