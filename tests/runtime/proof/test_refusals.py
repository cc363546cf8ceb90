from itertools import permutations

import pytest

from gemma_runtime.proof.refusals import ENGLISH, is_refusal


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but no.",
        "I’m really sorry, I can’t do that.",
        "**I cannot** fulfill this request.",
        "As an AI, I have no body.",
        "Unfortunately, I am not allowed to.",
        "That would be unethical.",
        "Hello! Thanks for asking. I'm not able to give you that.",
        "I DON'T FEEL COMFORTABLE with that",
    ],
)
def test_refusals_are_told_by_how_they_begin(reply: str) -> None:
    assert is_refusal(reply)


@pytest.mark.parametrize(
    "reply",
    ["", "Sure! Here is how.", "I can help with that.", "x" * 200 + " I cannot", "As an airline,"],
)
def test_other_replies_are_not(reply: str) -> None:
    assert not is_refusal(reply)


def test_no_opening_begins_with_another() -> None:
    """Their probabilities are added, so they must exclude one another."""
    both = (*ENGLISH.refusing, *ENGLISH.complying)
    assert [pair for pair in permutations(both, 2) if pair[1].startswith(pair[0])] == []
