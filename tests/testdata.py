"""Where the public data and models are that some tests use."""

import os
from pathlib import Path

import pytest

TEST_DATA = Path(os.environ.get("ITUNE_TEST_DATA", Path(__file__).parents[2] / "shared"))
"""Public data and models used by some tests; they skip where it is absent."""


def public_data(path: str) -> Path:
    """A file or folder of the test data; skips the test where it is absent."""
    found = TEST_DATA / path
    if not found.exists():
        pytest.skip(f"needs {path} below ITUNE_TEST_DATA")
    return found
