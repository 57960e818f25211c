"""Calls of the Python API that were drawn at random: a result or one sentence, and no hang."""

import pytest
from generated_calls import Outcome, generated, outcome

QUICK, SLOW, LONG = range(150), range(150, 900), range(900, 4000)


def wrong(numbers: range) -> dict[str, Outcome]:
    """What each of the calls that ended wrong was, and how it ended."""
    found = {}
    for number in numbers:
        call = generated(number)
        ended = outcome(call)
        if ended.kind == "wrong":
            found[f"{number}: {call.said}"] = ended
    return found


def test_calls_end_in_a_result_or_in_a_sentence() -> None:
    assert wrong(QUICK) == {}


@pytest.mark.slow
def test_many_calls_end_in_a_result_or_in_a_sentence() -> None:
    assert wrong(SLOW) == {}


@pytest.mark.long
def test_3100_calls_end_in_a_result_or_in_a_sentence() -> None:
    assert wrong(LONG) == {}


def test_the_calls_are_of_all_kinds() -> None:
    ends = [outcome(generated(number)).kind for number in QUICK]
    assert ends.count("good") > 20
    assert ends.count("refused") > 80
