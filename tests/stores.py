"""An S3-compatible server for tests; it and all that is started beside it speak by the usual variables."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from clusters import await_answer, free_port


@contextlib.contextmanager
def s3(bucket: str = "bucket") -> Iterator[None]:
    """The server, in a process of its own, with one bucket; processes started meanwhile find it by environment."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    given = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    try:
        await_answer(given["AWS_ENDPOINT_URL"])
        with pytest.MonkeyPatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, value)
            place = {"scheme": "http", "endpoint_override": f"127.0.0.1:{port}"}
            keys = {"access_key": "test", "secret_key": "test", "region": "us-east-1"}
            pafs.S3FileSystem(**keys, **place, allow_bucket_creation=True).create_dir(bucket)
            yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A filesystem of that size at the folder; skips the test where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a small filesystem")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
