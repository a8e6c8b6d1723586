"""Prompt log-probabilities beside LoRA on CPU, where vLLM 0.32 computes them under the wrong rows' adapters.

Its runner projects the prompt's hidden states with the adapter indices of the batch's *sampled* rows: two requests in
a batch and the engine dies on the sizes, one and an adapter on the head would be misapplied. Here each request's rows
are projected under its own adapter.
"""

from typing import Any


def score_under_own_adapter(runner: Any) -> None:
    """Wrap a `GPUModelRunner`'s prompt log-probabilities, which vLLM's CPU runner inherits."""
    compute_all = runner._get_prompt_logprobs_dict

    def compute_each(hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        waiting, results = runner.num_prompt_logprobs, dict[str, Any]()
        for name in [name for name in waiting if name in num_scheduled_tokens]:
            _set_adapter(runner, runner.requests[name], num_scheduled_tokens[name])
            runner.num_prompt_logprobs = {name: waiting[name]}
            results |= compute_all(hidden_states, num_scheduled_tokens)
            if name not in runner.num_prompt_logprobs:
                del waiting[name]
        runner.num_prompt_logprobs = waiting
        return results

    runner._get_prompt_logprobs_dict = compute_each


def _set_adapter(runner: Any, request: Any, num_tokens: int) -> None:
    """Map all rows that will be projected to the request's adapter; the next step sets the batch's mapping anew."""
    rows = min(num_tokens, len(request.prompt_token_ids) - request.num_computed_tokens - 1)
    if rows > 0:
        adapter = request.lora_request
        mapping = (0 if adapter is None else adapter.lora_int_id,) * rows
        runner._set_active_loras(mapping, mapping, set() if adapter is None else {adapter})
