"""The Pareto set against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from itune_ray.sweep.pareto import pareto

FIGURES = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12
)


def test_a_small_case_by_hand():
    candidates = {"good": (0.9, -10.0), "small": (0.5, -2.0), "worse": (0.8, -10.0), "middle": (0.7, -5.0)}
    assert pareto(candidates) == ["good", "small", "middle"]


@given(FIGURES)
def test_inside_nobody_is_beaten_and_outside_everybody_is(candidates):
    front = set(pareto(candidates))
    for name, own in candidates.items():
        better = [n for n, f in candidates.items() if f != own and all(a >= b for a, b in zip(f, own, strict=True))]
        assert (name in front) == (not better)
        if better:
            assert front & set(better)
