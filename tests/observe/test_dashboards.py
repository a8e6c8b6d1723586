"""Dashboards and alerts against the table of metrics; tests/test_submit.py asks a Prometheus that watched a run."""

import re

from boards import ALERTS, BOARDS, PANELS

from itune_ray.observe.names import METRICS


def names_in(expressions):
    return {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}


def test_dashboards_and_the_table_name_the_same_metrics():
    exported = {metric.exported for metric in METRICS.values()}
    assert names_in(expression for *_, expression in PANELS) == exported
    assert names_in(expression for _, expression in ALERTS) <= exported


def test_labels_are_tags_of_their_metrics():
    known = {metric.exported: {"run", *metric.tags} for metric in METRICS.values()}
    for *_, expression in [*PANELS, *ALERTS]:
        for name, selectors in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)[=!]~?", selectors)) <= known[name], expression


def test_boards_have_distinct_names_and_panels_that_do_not_overlap():
    assert len({board["uid"] for board in BOARDS}) == len(BOARDS) == 5
    for board in BOARDS:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)
