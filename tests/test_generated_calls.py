"""Calls of the Python API that were drawn at random: a result or one sentence, and no hang."""

import pytest
from generated_calls import generated
from judged_calls import Outcome, outcome

QUICK, SLOW, LONG = range(150), range(150, 900), range(900, 4000)

Ends = dict[str, Outcome]


def made(numbers: range) -> Ends:
    """What each of the calls was, and how it ended."""
    found = {}
    for number in numbers:
        call = generated(number)
        found[f"{number}: {call.said}"] = outcome(call.run)
    return found


def wrong(ends: Ends) -> Ends:
    return {said: end for said, end in ends.items() if end.kind == "wrong"}


@pytest.fixture(scope="module")
def quick() -> Ends:
    return made(QUICK)


def test_calls_end_in_a_result_or_in_a_sentence(quick: Ends) -> None:
    assert wrong(quick) == {}


def test_the_calls_are_of_all_kinds(quick: Ends) -> None:
    kinds = [end.kind for end in quick.values()]
    assert kinds.count("good") > 20
    assert kinds.count("refused") > 80


@pytest.mark.slow
def test_many_calls_end_in_a_result_or_in_a_sentence() -> None:
    assert wrong(made(SLOW)) == {}


@pytest.mark.long
def test_3100_calls_end_in_a_result_or_in_a_sentence() -> None:
    assert wrong(made(LONG)) == {}
