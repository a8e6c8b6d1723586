"""Rows of objective `classify` as documents: the text once per label, and which label is its own."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from itune_ray.config.adaptation import LTuningConfig
from itune_ray.config.classify import ClassifyConfig
from itune_ray.data.chat import UnusableRow
from itune_ray.data.order import DOCUMENT_SCHEMA
from itune_ray.data.records import UNSAFE, Record

if TYPE_CHECKING:
    from itune_ray.config.train import TrainJob
    from itune_ray.data.chat import ChatRenderer

LABEL = "label"
"""Column of each segment: the label it asks for."""
CLASS = "class"
"""Column of each document: its own label."""


class Classes:
    """A text, or a chat up to its answer, once per label.

    Reasons: `no_label` (nothing that says which), `unknown_label` (none of the job's), `too_long`, and
    what the renderer refuses.
    """

    schema = pa.schema([*DOCUMENT_SCHEMA, (LABEL, pa.list_(pa.int32())), (CLASS, pa.list_(pa.int32()))])
    wanted = "at least one row within max_length whose label is one of model.peft.labels"

    def document(self, record: Record, job: "TrainJob", renderer: "ChatRenderer") -> dict[str, Any]:
        """See `Documents.document`."""
        from itune_ray.train.documents import DocumentError, check_length

        assert isinstance(job.objective, ClassifyConfig)
        assert isinstance(job.model.peft, LTuningConfig)
        labels, field = job.model.peft.labels, job.objective.field
        if record.meta.get(UNSAFE) is True:
            raise DocumentError("unsafe", "meta.unsafe: a row for evaluation, not for training")
        label: object = record.response if field is None else record.meta.get(field)
        if label is None:
            raise DocumentError("no_label", "no answer" if field is None else f"no meta.{field}")
        if label not in labels:
            raise DocumentError("unknown_label", repr(label))
        try:
            whole = renderer.text_ids(record.text).input_ids if record.text is not None else None
            ids = renderer.prompt_ids(record.prompt) if whole is None else whole
        except UnusableRow as error:
            raise DocumentError(error.reason, str(error)) from None
        check_length(len(ids), job)
        last = [False] * (len(ids) - 1) + [True]
        return {
            "input_ids": ids * len(labels),
            "supervised": last * len(labels),
            "lengths": [len(ids)] * len(labels),
            LABEL: list(range(len(labels))),
            CLASS: [labels.index(str(label))],
        }
