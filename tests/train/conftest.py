from collections.abc import Iterator

import architectures
import pictures
import pytest
import tiny
import torch
import torch.distributed as dist


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny pretrained model."""
    return tiny.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny LLaVA."""
    return architectures.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Chats with images."""
    return pictures.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    """fsdp2 makes a process group even for one process; no test may see another's."""
    torch.set_num_threads(1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
