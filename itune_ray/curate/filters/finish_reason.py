"""Finish reason: answers that ended by themselves."""

from itune_ray.config.curate import FinishReasonConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.records import Record


class FinishReason(RowFilter):
    """Drops answers that an engine cut off: a student that learns from them never learns to stop.

    Rows that no model wrote have no finish reason and stay.
    """

    def __init__(self, config: FinishReasonConfig):
        self._allowed = frozenset(config.allowed)

    def keep(self, record: Record) -> Verdict:
        reason = record.finish_reason
        return KEEP if reason is None or reason in self._allowed else Verdict(False, f"finish_{reason}")
