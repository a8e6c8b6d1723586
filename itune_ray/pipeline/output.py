"""The output root: where a run's artifacts go."""

import os

from itune_ray.cluster import in_submitted_job
from itune_ray.config.shared import RunSettings
from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError


def output_root(settings: RunSettings) -> str:
    """The output root as an absolute path or URI.

    Raises:
        StorageError: A submitted job names none: its working directory is thrown away with everything in it.
    """
    root = settings.output or os.environ.get("ITUNE_OUTPUT")
    if in_submitted_job() and (root is None or not (root.startswith("/") or "://" in root)):
        raise StorageError(
            "a submitted job needs an output root that outlives it",
            got=root,
            allowed="an absolute path on shared storage or a URI",
            knob="output=... or ITUNE_OUTPUT",
        )
    return Folder.at(root or "runs").uri
