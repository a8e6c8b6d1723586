"""[Ray] Tokens that engines read and wrote, said by the replicas themselves: the one place where a run's are counted.

Whoever asks an engine, a recipe or the judge inside it, a filter, a benchmark or a trial, is counted here and nowhere
else; a request that two senders share is counted once, and one whose sender died all the same.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from itune_ray.observe import metrics

ANSWER_S = 2.0
"""A replica that does not answer within this time is asked again later; nothing is lost by it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a replica has read and written since its process began; one that restarts begins again under a new name."""

    life: str
    """Names the process."""
    prompt: int = 0
    """Tokens of prompts, of scored sequences and of texts to embed; those found in the prefix cache among them."""
    generated: int = 0


class TokenCount:
    """Turns what replicas say of themselves into `itune_tokens_total`; safe to call from several threads.

    Of a replica that dies, what it worked since it was asked last is missing, and so is what it had not finished;
    requests that are given up are counted nowhere.
    """

    def __init__(self) -> None:
        self._known: dict[str, Usage] = {}
        self._lock = threading.Lock()

    def add(self, usage: Usage) -> None:
        """Record what came since this replica was counted last; what is older than that adds nothing."""
        with self._lock:
            known = self._known.get(usage.life, Usage(usage.life))
            prompt, generated = usage.prompt - known.prompt, usage.generated - known.generated
            if prompt < 0 or generated < 0:
                return
            self._known[usage.life] = usage
        metrics.count("itune_tokens_total", prompt, kind="prompt")
        metrics.count("itune_tokens_total", generated, kind="generated")

    def ask(self, replicas: Iterable[Any]) -> None:
        """Ask the replicas, all at once, and record what each has used since."""
        import ray
        from ray.exceptions import RayError

        asked = [replica.usage.options(concurrency_group="control").remote() for replica in replicas]
        done = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)[0] if asked else []
        for reference in done:
            try:
                usage: Any = ray.get(reference)
            except RayError:
                continue  # it died, and its successor begins at 0
            self.add(usage)
