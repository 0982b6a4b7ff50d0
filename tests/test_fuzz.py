"""A part of what `bench/fuzz.py` tries: nothing ends in anything but an answer or one line."""

import pytest

import fuzz


@pytest.mark.parametrize(("kind", "count"), [("images", 300), ("words", 200)])
def test_mutated_inputs_are_answered_or_refused(kind, count):
    attempt = fuzz.KINDS[kind]()
    outcomes = {fuzz.outcome(attempt, kind, 1, number)[0] for number in range(count)}
    assert outcomes == {"answered", "refused"}
