"""Length: bounds on the characters of prompt and answer."""

from itune_ray.config.curate import LengthConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.records import Record


class Length(RowFilter):
    """Keeps rows whose prompt and final answer have a fitting number of characters, outer white space not counted.

    The prompt is all turns before the final answer, system turns aside. A prompt row has no answer to measure; the
    text of a pretraining row is measured as an answer.
    """

    def __init__(self, config: LengthConfig):
        self._config = config

    def keep(self, record: Record) -> Verdict:
        answer = record.text if record.text is not None else record.response
        if answer is not None and (reason := self._answer_reason(len(answer.strip()))):
            return Verdict(False, reason)
        if record.text is not None:
            return KEEP
        size = sum(len(m["content"].strip()) for m in record.prompt if m["role"] != "system")
        if size < self._config.min_prompt:
            return Verdict(False, "short_prompt")
        return Verdict(False, "long_prompt") if size > self._config.max_prompt else KEEP

    def _answer_reason(self, size: int) -> str | None:
        if size < self._config.min_response:
            return "short_response"
        return "long_response" if size > self._config.max_response else None
