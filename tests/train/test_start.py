"""What the processes of a training load before they do anything: seconds of every start."""

import gc
import pkgutil
import subprocess
import sys

import pytest

from itune_ray import benchmarks
from itune_ray.curate import filters
from itune_ray.generate import recipes
from itune_ray.imports import importing, uncollected

PACKAGES = {"torch", "transformers", "transformers.modeling_utils", "transformers.processing_utils", "peft", "vllm"}


def loaded_by(*modules: str) -> set[str]:
    """The large packages that a fresh interpreter has after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*({PACKAGES} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_controller_unpickles_a_training_without_torch():
    assert loaded_by("itune_ray.train.workers", "itune_ray.train.prepare", "itune_ray.train.board") == set()


def test_rays_own_start_begins_before_torch_is_loaded():
    stages = [f"itune_ray.{stage}.run" for stage in ("generate", "curate", "train", "compress", "evaluate", "report")]
    assert loaded_by("itune_ray.cli", "itune_ray.sweep.run", *stages) == set()


def test_an_eval_actor_and_a_sweep_trial_begin_without_torch():
    assert loaded_by("itune_ray.evaluate.actor", "itune_ray.evaluate.ask", "itune_ray.sweep.trial") == set()


@pytest.mark.parametrize("package", [recipes, filters, benchmarks], ids=lambda package: package.__name__)
def test_what_workers_unpickle_loads_no_model_code(package):
    assert (
        loaded_by(*(module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."))) == set()
    )


def test_the_driver_renders_rows_without_a_model():
    assert loaded_by("itune_ray.train.run", "itune_ray.train.renderer") == {"torch", "transformers"}


def test_modules_are_there_when_the_block_ends(monkeypatch, tmp_path):
    (tmp_path / "cannot_load.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("colorsys", "sched"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with importing("colorsys", "itune_ray.no_such_module", "cannot_load", "sched"):
        pass
    assert {"colorsys", "sched"} <= sys.modules.keys()
    with pytest.raises(ModuleNotFoundError):
        import itune_ray.no_such_module  # noqa: F401  # pyright: ignore


def test_what_a_block_without_collections_made_is_left_out_of_later_ones():
    before = gc.get_freeze_count()
    try:
        with uncollected():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
        gc.disable()
        with uncollected():
            pass
        assert not gc.isenabled(), "whoever turned it off wants it off"
    finally:
        gc.enable()
        gc.unfreeze()
