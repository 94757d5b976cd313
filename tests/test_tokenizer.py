"""Streams: the parts that are printed as tokens come, joined, are the text."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

import data
from tokenizer import Stream, Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all day long\n" * 50


@pytest.fixture(scope="module", params=["dummy prefix, as Llama's", "no dummy prefix, as ours"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    if request.param.startswith("no"):
        return data.train_tokenizer([TEXT], 290, path)
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@given(st.text(st.sampled_from("the quick foxé漢😀 \n"), min_size=1), st.data())
def test_streamed_parts_join_to_the_decoded_text(tokenizer, text, draw):
    ids = tokenizer.encode(text)
    whole_characters = [k for k in range(1, len(ids) + 1) if not tokenizer.decode(ids[:k]).endswith("\ufffd")]
    cut = draw.draw(st.sampled_from(whole_characters))
    stream, parts, rest = Stream(tokenizer, ids[:cut]), [], ids[cut:]
    while rest:
        count = draw.draw(st.integers(1, 3))
        parts.append(stream.feed(rest[:count]))
        rest = rest[count:]
    assert "\ufffd" not in "".join(parts)
    assert tokenizer.decode(ids[:cut]) + "".join(parts) + stream.finish() == tokenizer.decode(ids)


def test_a_character_in_several_tokens_is_printed_once_whole(tokenizer):
    ids = tokenizer.encode("a😀b", bos=False)
    stream = Stream(tokenizer, tokenizer.encode("x"))
    parts = [stream.feed([i]) for i in ids]
    assert "😀" in parts and "".join(parts).endswith("a😀b")


def test_a_leading_space_is_kept(tokenizer):
    prompt, whole = tokenizer.encode("the"), tokenizer.encode("the dog")
    assert Stream(tokenizer, prompt).feed(whole[len(prompt) :]).startswith(" ")


@given(st.lists(st.integers(3, 258), max_size=60))
def test_bytes_that_are_no_text_never_stop_the_stream(tokenizer, ids):
    stream = Stream(tokenizer, [])
    assert "".join(stream.feed([i]) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_byte_fallback_of_tokenizer_json_streams_whole_characters(tmp_path):
    """Its decoder turns a whole run of bytes into U+FFFD while the last character is unfinished, printed ones included."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"a": 256, "b": 257}
    fast = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("a😀😀b", "a漢字b", "漢字", "éé", "aé"):
        stream, ids = Stream(tokenizer, []), tokenizer.encode(text)
        assert "".join(stream.feed([i]) for i in ids) + stream.finish() == text == tokenizer.decode(ids)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError):
        Tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("bos", [1, None])
def test_held_out_prompts_are_ids_of_one_length_whether_there_is_a_bos_or_not(tokenizer, monkeypatch, bos):
    monkeypatch.setattr(tokenizer, "bos", bos)
    monkeypatch.setattr(data, "read_files", lambda files: [data.Document("a.py", "\n" * 300 + "\n    def f(x):\n        return x\n", kept_back=True)])
    (prompt,) = data.held_out_prompts(1, tokenizer, 8)
    assert len(prompt) == 8 and all(type(token) is int for token in prompt) and (prompt[0] == 1) == (bos is not None)
