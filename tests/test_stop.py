"""Stop strings: the text ends before the first to be complete, wherever a token ends."""

import pytest
import torch
from helpers import text_of
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import KINDS, added, ids_of, split

from decode import Round
from support.console import until
from support.tokenizer import Stream, Tokenizer


@pytest.fixture(scope="module", params=["Llama 2's", "ours", "byte level"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop that ends first; of two that end there, before the longer."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@st.composite
def stops_for(draw, text: str) -> list[str]:
    """Parts of the text, some inside others, some continued otherwise, and texts of any kind."""
    place, size = st.integers(0, len(text)), st.integers(1, 6)
    part = st.builds(lambda a, n: text[a : a + n], place, size)
    false = st.builds(lambda part, more: part + more, part, st.text("the 漢\ufffd", max_size=2))
    stops = draw(st.lists(part | false | st.text(max_size=3), max_size=4))
    return [s for stop in stops for s in (stop, stop[1:-1] * draw(st.booleans())) if s]


@given(st.data())
def test_the_text_ends_before_the_first_stop_and_holds_back_no_more_than_may_become_one(
    tokenizer, data
):
    ids = data.draw(ids_of(tokenizer))
    context, rest = ids[:2], ids[2:]
    text = added(tokenizer, context, rest)
    stops = data.draw(stops_for(text))
    expected = cut(text, stops)
    stream, plain = Stream(tokenizer, context, stops), Stream(tokenizer, context)
    shown = whole = ""
    for portion in split(rest, data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))):
        shown += stream.feed(portion)
        whole += plain.feed(portion)
        assert expected.startswith(shown)
        held = whole[len(shown) :]
        assert stream.stopped or not held or any(stop.startswith(held) for stop in stops)
        assert stream.stopped == (cut(whole, stops) != whole)
    assert shown + stream.finish() == expected and stream.stopped == (expected != text)


@given(st.data())
def test_rounds_end_with_the_token_that_completes_a_stop_however_many_tokens_they_have(
    tokenizer, data
):
    ids = data.draw(ids_of(tokenizer))
    stops = data.draw(stops_for(tokenizer.decode(ids)))

    def kept(portions: list[list[int]]) -> list[int]:
        rounds = (Round([], part, torch.tensor(part)[:, None]) for part in portions if part)
        found = text_of([Round([], [], torch.zeros(0, 1)), *until(rounds, stream())])
        assert found.logits[:, 0].tolist() == found.ids
        return found.ids

    stream = lambda: Stream(tokenizer, [], stops)
    plain = kept([[token] for token in ids])
    assert plain == kept(split(ids, data.draw(st.lists(st.integers(0, 9), max_size=4))))
    before, whole = stream(), stream()
    before.feed(plain[:-1]), whole.feed(plain)
    assert not before.stopped and (whole.stopped or plain == ids)
