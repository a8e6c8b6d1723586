"""When a run is given up, and what is left of it."""

import pytest
import tiny

from itune_ray.config.train import DivergenceConfig
from itune_ray.errors import TrainError
from itune_ray.train.divergence import Divergence
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics

STRICT = {"factor": 1.5, "slack": 0.1, "steps": 3}


def seen(losses, **settings):
    """The step at which a run of these losses is given up, or None."""
    watch = Divergence(DivergenceConfig(**{**STRICT, **settings}))
    for step, loss in enumerate(losses, 1):
        try:
            watch.see(step, loss)
        except TrainError:
            return step
    return None


def test_a_mean_above_the_lowest_by_factor_and_slack_ends_the_run():
    """Lowest mean 1.0, so 1.6 is the limit: windows of 2, 1, 1 and 2, 2, 1 have means 4/3 and 5/3."""
    assert seen([1, 1, 1, 2, 2, 2]) == 5
    assert seen([1, 1, 1, 2, 2, 2], slack=0.2) == 6
    assert seen([1, 1, 1, 2, 2, 2], factor=3) is None


def test_a_run_that_is_lost_at_once_is_measured_by_where_it_began():
    assert seen([5, 150, 300, 500]) == 3


def test_one_bad_step_and_a_loss_that_falls_end_nothing():
    assert seen([4, 3, 2, 1, 1, 2.7, 1, 1]) is None
    assert seen([1e-4, 1e-4, 1e-4, 0.09, 0.09, 0.09]) is None  # ever so many times the lowest, within the slack
    assert seen([-1, -1, -1, -0.6, -0.6, -0.6]) is None
    assert seen([-1, -1, -1, 0, 0, 0]) == 5


def test_a_run_that_diverges_ends_in_one_line_and_keeps_its_checkpoint(folder, tmp_path):
    settings = {"steps": 40, "batch": 4, "checkpoint": {"every_steps": 2}, "clip_norm": None}
    lost = {"optimizer": {"type": "adamw", "lr": 3.0}, "divergence": STRICT}
    with pytest.raises(
        TrainError, match=r"diverged at step \d+.*mean loss.*optimizer\.lr.*divergence=null.*`divergence`"
    ):
        train_local(tiny.job(folder, **settings, **lost), tiny.chats(16), str(tmp_path))
    assert [row["step"] for row in read_metrics(str(tmp_path))] == [1, 2, 3]
    assert [folder.name for folder in (tmp_path / "checkpoint").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("log_every", [1, 7])
def test_a_restart_forgets_no_loss(folder, tmp_path, log_every):
    """Three steps make a window; the run is stopped after two of them."""
    settings = {"steps": 40, "batch": 4, "checkpoint": {"every_steps": 2}, "clip_norm": None, "log_every": log_every}
    job = tiny.job(folder, **settings, optimizer={"type": "adamw", "lr": 3.0}, divergence=STRICT)
    train_local(job, tiny.chats(16), str(tmp_path), stop_at=2)
    with pytest.raises(TrainError, match="diverged at step 3"):
        train_local(job, tiny.chats(16), str(tmp_path))


def test_when_to_give_up_does_not_change_what_a_job_is():
    assert tiny.job("m").identity() == tiny.job("m", divergence=None).identity()
