"""Every method with every strategy: the same run as one process by ddp, or a refusal that says why."""

import itertools
from pathlib import Path

import pytest
import tiny
from methods import METHODS, rows, settings
from pydantic import ValidationError
from ranks import STRATEGIES, run_ranks
from safetensors.torch import load_file

from itune_ray.config.adaptation import SUPPORT
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally

pytestmark = pytest.mark.real
CELLS = list(itertools.product(METHODS, STRATEGIES))
TRAINED = [(method, strategy) for method, strategy in CELLS if strategy not in SUPPORT[method].refused]
REFUSED = [cell for cell in CELLS if cell not in TRAINED]


def job_of(folder, method, strategy, **overrides):
    shape = {"steps": 2, "batch": 8, "packing": True, "pack_length": 160, "micro_batch": 2}
    return tiny.job(folder, **{**shape, **settings(method), "strategy": STRATEGIES[strategy], **overrides})


def figures(stage):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


def train_cells(cells):
    """On this rank: the figures of every prepared cell, or what went wrong in it."""
    found = []
    for job, stage in cells:
        try:
            train_rank(job, prepare_locally(job, [], stage), stage)
            found.append(figures(stage))
        except Exception as error:  # noqa: BLE001  told by the test of the cell
            found.append(f"{type(error).__name__}: {error}")
            break  # the other rank may be elsewhere by now
    return found


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Method -> stage of one process by ddp, documents not packed."""
    stages = {}
    for method in METHODS:
        stages[method] = tmp_path_factory.mktemp("alone")
        job = job_of(folder, method, "ddp", packing=False, pack_length=None)
        train_local(job, rows(method, 16), str(stages[method]))
    return stages


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """Cell -> its stage, and its figures or what went wrong."""
    cells = []
    for method, strategy in TRAINED:
        stage = str(tmp_path_factory.mktemp("two"))
        job = job_of(folder, method, strategy)
        prepare_locally(job, rows(method, 16), stage)
        cells.append((job, stage))
    found = run_ranks(2, train_cells, cells, timeout=280)[0]
    return {cell: (stage, row) for cell, (_, stage), row in zip(TRAINED, cells, found, strict=False)}


@pytest.mark.parametrize("cell", TRAINED, ids="-".join)
def test_two_ranks_packed_are_one_process_unpacked(cell, two_ranks, alone):
    """In loss, in the norm of the gradient and in what is written."""
    assert cell in two_ranks, "a cell before this one failed"
    stage, found = two_ranks[cell]
    assert isinstance(found, list), found
    for (loss, norm), (expected_loss, expected_norm) in zip(found, figures(alone[cell[0]]), strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    written = [p.relative_to(alone[cell[0]]) for p in alone[cell[0]].glob("*/*.safetensors")]
    assert {p.parent.name for p in written} <= {"model", "adapter"} != set()
    for path in written:
        one, other = load_file(alone[cell[0]] / path), load_file(Path(stage) / path)
        assert one.keys() == other.keys()
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-4, path


@pytest.mark.parametrize("cell", REFUSED, ids="-".join)
def test_what_a_strategy_cannot_train_is_refused_with_the_reason(folder, cell):
    method, strategy = cell
    with pytest.raises(ValidationError) as caught:
        job_of(folder, method, strategy)
    assert SUPPORT[method].refused[strategy] in str(caught.value)
    assert f"method {method} cannot be trained with strategy {strategy}" in str(caught.value)
