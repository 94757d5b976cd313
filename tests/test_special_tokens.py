"""BOS, EOS and added tokens are what the files of a checkpoint say, in the order that is stated."""

import json
from pathlib import Path

import pytest
from test_tokenizer import sentencepiece as write_pieces
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from extras.chat import Chat
from model import Config, Llama, save_checkpoint
from support.decode_command import main
from support.tokenizer import Stream, Tokenizer
from train import initialise

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"  # ids 256 and 257 of write_json
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def put(path: Path, name: str, **found: object) -> None:
    """Writes a JSON file of a checkpoint."""
    (path / name).write_text(json.dumps(found))


def config(path: Path, **found: object) -> None:
    put(path, "tokenizer_config.json", **found)


def write_json(path: Path, *special: str, template: str | None = None) -> None:
    """A tokenizer.json of bytes, with special tokens from id 256 on."""
    model = Backend(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    if template:
        ids = [(text, 256 + i) for i, text in enumerate(special) if text in template]
        model.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    model.save(str(path / "tokenizer.json"))


def write_model(path: Path, vocab: int, layers: int = 4, **changes: object) -> None:
    shape = Config(vocab, 32, 64, layers, 2, 1, 16, 256, **changes)  # type: ignore[arg-type]
    initialise(model := Llama(shape), 0)
    save_checkpoint(model, path)


# --------------------------------------
# Which tokens BOS and EOS are


SAYS = {  # what each file says EOS is, in the stated order; ids from 256 on
    "tokenizer_config.json": dict(eos_token="<a>"),
    "generation_config.json": dict(eos_token_id=[257, 256]),
    "config.json": dict(eos_token_id=258),
}


@pytest.mark.parametrize("first", range(5))
def test_the_first_file_in_the_order_says_eos(tmp_path, first):
    template = "$A <d>" if first <= 3 else None
    write_json(tmp_path, "<a>", "<b>", "<c>", "<d>", "</s>", template=template)
    for name, found in list(SAYS.items())[first:]:
        put(tmp_path, name, **found)
    assert Tokenizer(tmp_path).eos == 256 + first


@pytest.mark.parametrize("whole", [True, False])
def test_other_files_count_where_the_config_lists_no_added_tokens(tmp_path, whole):
    write_json(tmp_path, "<a>", "<b>")
    config(tmp_path, eos_token="<a>", **{"added_tokens_decoder": {}} if whole else {})
    put(tmp_path, "special_tokens_map.json", eos_token={"content": "<b>"}, bos_token="<a>")
    put(tmp_path, "added_tokens.json", **{"<c>": 258})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos) == ((None, 256) if whole else (256, 257))
    assert tokenizer.added.get("<c>") == (None if whole else 258)


def test_what_is_no_token_here_is_passed_over(tmp_path):
    write_json(tmp_path, BOS, EOS)
    config(tmp_path, bos_token=None, eos_token=None)
    put(tmp_path, "generation_config.json", eos_token_id=[9999, -1, True, "x"], bos_token_id=None)
    put(tmp_path, "config.json", bos_token_id=[256])
    assert (Tokenizer(tmp_path).bos, Tokenizer(tmp_path).eos) == (256, 257)


def test_a_sentencepiece_model_says_its_own_last(tmp_path):
    write_pieces(tmp_path)
    assert (Tokenizer(tmp_path).bos, Tokenizer(tmp_path).eos) == (1, 2)
    put(tmp_path, "generation_config.json", eos_token_id=7)
    assert (Tokenizer(tmp_path).bos, Tokenizer(tmp_path).eos) == (1, 7)


# --------------------------------------
# What stands before and after a text


@pytest.mark.parametrize(
    "template, before", [("$A {e}", []), ("{b} $A {e}", [256]), ("{b} {e} $A", [256, 257])]
)
def test_eos_after_a_text_is_dropped_and_bos_is_what_stands_before(tmp_path, template, before):
    write_json(tmp_path, BOS, EOS, template=template.format(b=BOS, e=EOS))
    config(tmp_path, bos_token=BOS, eos_token=EOS)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos) == (256, 257)
    assert tokenizer.encode("hi") == [*before, 71, 72] and tokenizer.encode("") == before
    assert tokenizer.encode("hi", bos=False) == [71, 72], "no token of the text is lost"


@pytest.mark.parametrize("said", [True, False, None])
def test_add_bos_token_of_a_sentencepiece_model_is_followed(tmp_path, said):
    write_pieces(tmp_path)
    config(tmp_path, **{} if said is None else {"add_bos_token": said})
    tokenizer = Tokenizer(tmp_path)
    before = [] if said is False else [1]
    assert tokenizer.encode("the") == before + tokenizer.encode("the", bos=False)
    assert tokenizer.bos == 1


# --------------------------------------
# Two files, added tokens


def grown(path: Path) -> None:
    """A tokenizer.model of 300 pieces, and a tokenizer.json of the same ids and one token more."""
    write_pieces(path)
    pieces = {Tokenizer(path).file.model.id_to_piece(i): i for i in range(300)}
    model = Backend(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.add_special_tokens(["<s>", "</s>"])
    model.add_tokens(["<|im_start|>"])
    model.save(str(path / "tokenizer.json"))


def test_the_file_with_more_tokens_serves_prompts_and_chats(tmp_path):
    grown(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 301 and tokenizer.encode("<|im_start|>") == [300]
    assert tokenizer.decode([300]) == "<|im_start|>", "ids from 300 on are printed"
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    assert Chat(tmp_path).ask("x")[0] == 300 == Chat(tmp_path, tokenizer).ask("x")[0]


def test_a_damaged_file_beside_a_good_one_is_passed_over(tmp_path):
    write_pieces(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert Tokenizer(tmp_path).vocab_size == 300
    write_json(tmp_path, BOS)
    (tmp_path / "tokenizer.model").write_bytes(b"half")
    assert Tokenizer(tmp_path).vocab_size == 257


def decoder_of(*texts: str, first: int) -> dict:
    return {str(first + i): dict(content=text, special=True) for i, text in enumerate(texts)}


END = "<|im_end|>"
NAMED = {"eos_token": END}
WHERE = {  # a token is added: what tokenizer_config.json says of it
    "a table": lambda size: NAMED | {"added_tokens_decoder": decoder_of(END, first=size)},
    "a name": lambda size: NAMED,
    "a list": lambda size: {"additional_special_tokens": [END]},
}
WRITERS = [
    lambda path: write_pieces(path, remove_extra_whitespaces=False),
    lambda path: write_json(path, "<a>"),
]


@pytest.mark.parametrize("write, size", [*zip(WRITERS, (300, 257))])
@pytest.mark.parametrize("where", WHERE)
def test_tokens_that_the_config_adds_have_ids_and_no_text(tmp_path, write, size, where):
    write(tmp_path)
    config(tmp_path, **WHERE[where](size))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 1 and tokenizer.added[END] == size
    assert tokenizer.eos == (2 if where == "a list" and size == 300 else size)
    ids, stream = tokenizer.encode("the fox"), Stream(tokenizer, [])
    text = tokenizer.decode(ids)
    assert tokenizer.decode([size, *ids, size]) == text
    assert "".join(stream.feed([i]) for i in [*ids, size]) + stream.finish() == text


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "flag, text, plain, flagged",
    [
        ("rstrip", "the<a> fox", "the fox", "thefox"),
        ("lstrip", "the <a>fox", "the fox", "thefox"),
        ("single_word", "the<a>fox", "thefox", "the<a>fox"),
    ],
)
def test_flags_in_tokenizer_config_count(tmp_path, write, flag, text, plain, flagged):
    """Over those of the tokenizer file, if it has the token. A special token has no text."""
    write(tmp_path)
    for value, wanted in ((False, plain), (True, flagged)):
        how = {"content": "<a>", "special": True, "normalized": False, flag: value}
        config(tmp_path, added_tokens_decoder={"300": how})
        tokenizer = Tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.file.parse(text)) == wanted


def test_a_token_that_a_name_calls_special_is_special(tmp_path):
    """A tokenizer.json may have it as an ordinary one, which would be printed."""
    write_json(tmp_path, "<a>")
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"special": true', '"special": false'))
    assert "<a>" not in Tokenizer(tmp_path).special
    config(tmp_path, eos_token="<a>")
    tokenizer = Tokenizer(tmp_path)
    assert "<a>" in tokenizer.special and tokenizer.decode([71, 256]) == "h"


def test_a_token_that_is_listed_twice_has_its_first_id(tmp_path):
    write_pieces(tmp_path)
    config(tmp_path, added_tokens_decoder=decoder_of("<a>", "<b>", "<a>", first=300))
    assert Tokenizer(tmp_path).file.parse("<a>") == [300]


def test_add_prefix_space_of_a_sentencepiece_model_is_followed(tmp_path):
    write_pieces(tmp_path)
    with_space = Tokenizer(tmp_path).encode("the", bos=False)
    config(tmp_path, add_prefix_space=False)
    tokenizer = Tokenizer(tmp_path)
    without = tokenizer.encode("the", bos=False)
    assert with_space != without and tokenizer.decode(without) == "the"
    assert tokenizer.file.parse("the") == without


@pytest.mark.parametrize("table", [[1], {"x": {"content": "<a>"}}, {"300": {}}])
def test_added_tokens_that_are_no_table_are_one_line(tmp_path, table):
    write_pieces(tmp_path)
    config(tmp_path, added_tokens_decoder=table)
    with pytest.raises(ValueError, match="added tokens") as refused:
        Tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


# --------------------------------------
# A tokenizer with more tokens than the model


def test_a_token_more_than_the_model_has_is_refused_in_a_prompt_alone(tmp_path, command):
    """Whether a file lists it, as here <pad>, or only a name, as [PAD]."""
    write_json(tmp_path, BOS, EOS, "<pad>")
    config(tmp_path, bos_token=BOS, eos_token=EOS, pad_token="[PAD]")
    write_model(tmp_path, 258)
    assert Tokenizer(tmp_path).vocab_size == 260
    run = f"--ckpt {tmp_path} --dtype float32 --max-new-tokens 4 --prompt".split()
    assert command(main, *run, "hi").code == 0
    for more in (["--exit", "auto"], ["--full"]):
        for token in ("[PAD]", "<pad>"):
            said = command(main, *more, *run, f"a {token} b, many words of it")
            assert said.code == 2 and said.err.count("\n") == 1
            assert "outside the vocabulary of 258" in said.err
