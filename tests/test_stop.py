"""Stop strings: the text ends before the first to be complete, wherever a token ends."""

import pytest
from helpers import Text, same_bits, text_of, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import KINDS, added, ids_of, split

from decode import Sampling, generate
from exact import pack
from model import Llama
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
    """Parts of the text, which may overlap, some continued otherwise, and texts of any kind."""
    place, size = st.integers(0, len(text)), st.integers(1, 6)
    part = st.builds(lambda a, n: text[a : a + n], place, size)
    false = st.builds(lambda part, more: part + more, part, st.text("the 漢\ufffd", max_size=2))
    return [s for s in draw(st.lists(part | false | st.text(max_size=3), max_size=4)) if s]


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


@pytest.fixture(scope="module")
def model() -> Llama:
    """Of the shipped tokenizer's size; its second exit foresees most of what it says."""
    return pack(tiny_model(tiny_config(vocab_size=2048), damp_from=2))


@given(st.integers(0, 9), st.integers(0, 60), st.integers(1, 4))
def test_rounds_end_with_the_token_that_completes_a_stop_whoever_drafts(
    model, shipped, seed, place, size
):
    tokenizer, sampling = Tokenizer(shipped), Sampling(0.9, seed=seed)
    prompt, how = tokenizer.encode("def"), dict(draft_len=5, max_new_tokens=20, sampling=sampling)
    whole = text_of(generate(model, prompt, **how)).ids
    stop = Stream(tokenizer, prompt).feed(whole)[place : place + size] or "\n"

    def stopped(**drafting) -> Text:
        rounds = generate(model, prompt, **how | drafting)
        return text_of(until(rounds, Stream(tokenizer, prompt, [stop])))

    plain, drafted = stopped(), stopped(exit_layer=2)
    count = len(plain.ids)
    assert same_bits(plain, drafted) and plain.ids == whole[:count]
    early, stream = (Stream(tokenizer, prompt, [stop]) for _ in range(2))
    early.feed(whole[: count - 1]), stream.feed(plain.ids)
    assert not early.stopped and (stream.stopped or count == 20)
