import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import SessionError
from gemma_runtime.text.stop_strings import StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(st.text("abc", max_size=4), max_size=8), stops=STOPS)
def test_text_is_cut_before_the_stop_string_that_ends_first(
    pieces: list[str], stops: list[str]
) -> None:
    filtered = StopStrings(stops)
    shown = "".join(filtered.push(piece) for piece in pieces)
    assert shown + filtered.flush() == _by_definition("".join(pieces), stops)


@given(text=st.text("abc", max_size=12), stops=STOPS)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(
    text: str, stops: list[str]
) -> None:
    filtered = StopStrings(stops)
    shown = "".join(filtered.push(character) for character in text)
    held = filtered.flush()
    if filtered.found:
        assert held == ""
    else:
        assert shown + held == text
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(
            stop.startswith(text[start:]) for start in range(len(shown)) for stop in stops
        )


def _by_definition(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SessionError, match="stop string is empty"):
        StopStrings(["a", ""])
