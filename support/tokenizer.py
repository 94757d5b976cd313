"""Text to token ids and back, and a decoder for streams that never prints half a character.

A token may end inside a UTF-8 character, and decoding drops a leading space: see `Stream`.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Set
from itertools import takewhile
from operator import eq
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from support.checkpoint import WRONG_KIND, advice, read_json

EDGES = ("lstrip", "rstrip", "single_word")  # takes the white space beside it; is no part of a word
FLAGS = {"special", "normalized", *EDGES}  # of an added token
USUAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>"),
}


class Tokenizer:
    """tokenizer.model (Llama 1 and 2, ours) or tokenizer.json (Llama 3) in the folder `path`.

    Where there are both, the one with more tokens. `path` may also be one of these files. Raises
    ValueError when there is no usable one.

    `bos` and `eos` are ids or None. The first that says one counts: what the tokenizer file puts
    before a text (BOS only), tokenizer_config.json with special_tokens_map.json,
    generation_config.json, config.json, the tokenizer file, and the names in USUAL.
    """

    config: dict  # tokenizer_config.json with special_tokens_map.json
    names: dict[str, str]  # bos_token and the like, as chat templates have them
    added: dict[str, int]  # tokens that the text of a conversation may name
    special: Set[str]  # those of them that a message may not name
    closing: Set[int]  # ids after which the text before them is final

    def __init__(self, path: str | Path):
        path = Path(path)
        folder = path.parent if path.is_file() else path
        read = lambda name: read_json(folder / name) if (folder / name).is_file() else {}
        self.config = read("tokenizer_config.json")
        ids: dict = {}
        if "added_tokens_decoder" not in self.config:  # else transformers does not read these
            ids = read("added_tokens.json")
            self.config |= read("special_tokens_map.json")
        texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in self.config.items()}
        named = {k: v for k, v in texts.items() if k.endswith("_token") and isinstance(v, str)}
        try:
            added = added_tokens(self.config, ids, named.values())
        except (*WRONG_KIND, AttributeError):
            raise ValueError(f"the added tokens of {folder} are no table of tokens") from None
        found: list[SentencePieceFile | JsonFile] = []
        wrong = [ValueError(f"no tokenizer.model or tokenizer.json at {path}")]
        files = [path] if path.is_file() else [path / "tokenizer.model", path / "tokenizer.json"]
        for name in filter(Path.is_file, files):
            try:
                kind = JsonFile if name.suffix == ".json" else SentencePieceFile
                found.append(kind(name, self.config, added))
            except ValueError as error:
                wrong.append(error)
        if not found:
            raise wrong[-1]
        size = lambda file: max(file.ids.values(), default=-1) + 1
        self.file = file = max(found, key=size)
        self.vocab_size, self._decode = size(file), file.decode
        self.added, self.special, self.closing = file.added, file.special, file.closing
        self.names = {k: v for k, v in file.names.items() if k not in self.config} | named
        saved = [advice(folder / "generation_config.json"), read("config.json")]

        def decide(kind: str, said: list) -> int | None:
            said = [*said, file.ids.get(named.get(f"{kind}_token", ""))]
            for value in (settings.get(f"{kind}_token_id") for settings in saved):
                said += value if isinstance(value, list) else [value]
            said += map(file.ids.get, (file.names.get(f"{kind}_token", ""), *USUAL[kind]))
            return next((i for i in said if type(i) is int and 0 <= i < self.vocab_size), None)

        self.bos, self.eos = decide("bos", file.before[:1]), decide("eos", [])

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, after what the tokenizer file puts before a text where `bos` is set."""
        text.encode()  # refuses half a surrogate pair
        return self.file.before * bos + self.file.encode(text)

    def encode_marked(self, parts: list[str]) -> list[int]:
        """Ids of a conversation in parts. The 2nd, 4th ... name tokens that are to be text."""
        "".join(filter(None, parts)).encode()
        ids = self.file.parse(parts[0])
        for place, part in enumerate(parts[1:], 1):
            if part:
                new = self.file.go_on(part, place % 2)
                if place % 2 and self.added[part] in new:  # the model has it as one piece
                    new = self.file.go_on(part[0], 1) + self.file.go_on(part[1:], 1)
                ids += new
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`: of bad bytes, U+FFFD; of BOS, EOS and unknown ids, none."""
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])


def added_tokens(config: dict, ids: dict, named: Iterable[str]) -> dict[str, dict]:
    """By text, what tokenizer_config.json, added_tokens.json (`ids`) and names tell of tokens."""
    table = config.get("added_tokens_decoder") or {}
    listed = [(int(i), token["content"], token) for i, token in table.items()]
    listed += [(int(i), text, {}) for text, i in ids.items()]
    found: dict = {}
    for i, text, how in sorted(listed, key=lambda token: token[0]):  # the first id, the last flags
        found[text] = how | {"id": found.get(text, {}).get("id", i)}
    for text in named:
        found.setdefault(text, {}).update(special=True, named="added_tokens_decoder" not in config)
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for text in (t["content"] if isinstance(t, dict) else t for t in more):
        found.setdefault(text, {"special": True})
    return {text: how for text, how in found.items() if isinstance(text, str) and text}


def any_of(texts: Iterable[str], flags: Mapping[str, dict] = {}) -> str:
    """A regular expression for one of the texts, the longest first, as EDGES of `flags` say."""

    def one(text: str) -> str:
        told = flags.get(text, {}) if text == text.strip() else {}
        left, right, word = (told.get(flag) is True for flag in EDGES)
        found = rf"(?<!\w){re.escape(text)}(?!\w)" if word else re.escape(text)
        return r"\s*" * left + found + r"\s*" * right

    return "|".join(map(one, sorted(texts, key=len, reverse=True))) or "(?!)"


class SentencePieceFile:
    """A tokenizer.model. Control tokens, and those that files beside it add, have no text."""

    def __init__(self, path: Path, config: dict, added: dict[str, dict]):
        self.model, self.inner = model, inner = SentencePieceProcessor(), SentencePieceProcessor()
        proto = path.read_bytes()
        if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", proto):  # base64 and a rank: Llama 3's
            raise ValueError(f"{path} is in tiktoken's format: put a tokenizer.json beside it")
        try:
            model.LoadFromSerializedProto(proto)
            # normalizer_spec.add_dummy_prefix = false: of a field that is there twice, the last.
            inner.LoadFromSerializedProto(proto + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise ValueError(f"{path} is not a sentencepiece model") from None
        if config.get("add_prefix_space") is False:
            self.model = model = inner
        self.encode, self.size = model.encode, model.vocab_size()
        self.ids = {model.id_to_piece(i): i for i in range(self.size)}
        self.closing = {i for i in range(self.size) if not model.is_control(i)}
        own = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
        self.names = {f"{kind}_token": model.id_to_piece(i) for kind, i in own.items() if i >= 0}
        bos = "bos_token" in self.names and config.get("add_bos_token") is not False
        self.before = [model.bos_id()] * bos
        self.special = {text for text, i in self.ids.items() if i not in self.closing}
        self.special |= {text for text in added if added[text].get("special")}
        self.special |= {*self.names.values()}
        for text, how in added.items():
            self.ids.setdefault(text, how.get("id", len(self.ids)))
        self.added = {text: self.ids[text] for text in self.special | added.keys()}
        self.named = re.compile(f"({any_of(self.added, added)})")
        self.legacy = bool(config.get("legacy"))

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.model.decode([i for i in ids if i < self.size])

    def parse(self, text: str, start: bool = True) -> list[int]:
        """Ids of a text, with the tokens that it names."""
        ids = []
        for place, part in enumerate(self.named.split(text)):
            if place % 2:
                ids.append(self.added[part if part in self.added else part.strip()])
            elif part:
                first = (self.legacy if place else start) and not part.startswith((" ", "\u2581"))
                ids += (self.model if first else self.inner).encode(part)
        return ids

    def go_on(self, text: str, literal: int) -> list[int]:
        """Ids of a text that is no start; `literal`: it names no tokens."""
        return self.inner.encode(text) if literal else self.parse(text, start=False)


class JsonFile:
    """A tokenizer.json."""

    def __init__(self, path: Path, config: dict, added: dict[str, dict]):
        try:
            from tokenizers import AddedToken, Tokenizer  # only here

            self.model = model = Tokenizer.from_file(str(path))
            model.no_truncation()
            model.no_padding()
            own = {token.content: token for token in model.get_added_tokens_decoder().values()}
            for text, how in sorted(added.items(), key=lambda item: item[1].get("id", 1 << 30)):
                token = AddedToken(text, **{k: how[k] for k in FLAGS & how.keys()})
                if text in own and "content" not in how:  # not in the table, whose flags count
                    token = own[text]
                    token.special |= how.get("named", False)
                model.add_tokens([token])
            self.ids = model.get_vocab()
            tried = (model.encode(text) for text in ("a", *self.ids))
            found = next((e for e in tried if 0 in e.sequence_ids), model.encode(""))
        except ImportError:
            raise ValueError(f"{path} needs a package: pip install tokenizers") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic is no Exception
            reason = visible(" ".join(str(error).split()))
            raise ValueError(f"{path} is not a tokenizer: {reason:.300}") from None
        of = found.sequence_ids  # 0: a token of the text; None: what the template puts around it
        start = of.index(0) if 0 in of else len(of)
        self.before, after = found.ids[:start], found.tokens[start + of.count(0) :]
        self.names = dict(zip(["eos_token"], after))
        tokens = model.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in tokens.items()}
        self.special = {token.content for token in tokens.values() if token.special}
        # A bad byte turns a run of byte tokens into U+FFFD. Special tokens do not end a run.
        texts = {i for token, i in self.ids.items() if not re.fullmatch("<0x..>", token)}
        self.closing = texts - {self.added[text] for text in self.special}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that it names."""
        return self.model.encode(text, add_special_tokens=False).ids

    parse = encode

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.model.decode(ids, skip_special_tokens=True)

    def go_on(self, text: str, literal: int) -> list[int]:
        """Ids of a text that is no start, as transformers gets them: after a newline."""

        def plain(text: str) -> list[int]:
            clean, cut, model = self.model.normalizer, self.model.pre_tokenizer, self.model.model
            text = clean.normalize_str(text) if clean else text
            words = [word for word, _ in cut.pre_tokenize_str(text)] if cut else [text]
            return [token.id for word in words for token in model.tokenize(word)]

        encode, newline = plain if literal else self.encode, self.encode("\n")
        ids = encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)


def visible(text: str) -> str:
    r"""Text for a terminal: control characters as \x1b and the like, but for newline and tab."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


class Stream:
    """Decodes ids as they come, after those of `context`.

    The parts joined are decode(context + all ids) without the start it shares with decode(context).

    A window of the latest ids is decoded. After a closing id its text is final, but for U+FFFD as
    its last three characters: an unfinished character has at most three bytes. Old ids leave when
    the others decode to the same end, perhaps after U+FFFD for a cut character.

    With `stops`, the text ends before the first of them to be complete, and `stopped` says so. What
    may become one is held back.
    """

    KEEP = 8  # ids of a shortened window

    def __init__(self, tokenizer: Tokenizer, context: list[int], stops: Collection[str] = ()):
        self.tokenizer, self.window, self.given = tokenizer, list[int](), ""
        self.stops, self.stopped, self.held = list[str](), False, ""
        self.feed(context)
        self.given = tokenizer.decode(self.window)  # the start of its text that is out
        self.stops += stops

    def feed(self, ids: list[int]) -> str:
        """Takes the next ids; gives the text that no later id can change."""
        self.window += ids
        if not self.window or self.window[-1] not in self.tokenizer.closing:
            return ""
        text = self.tokenizer.decode(self.window)
        unsure = min(len(text) - len(text.rstrip("\ufffd")), 3)
        new = self._give(text[: len(text) - unsure])
        if len(self.window) > 4 * self.KEEP:
            tail = self.tokenizer.decode(self.window[-self.KEEP :])
            end = tail.lstrip("\ufffd") or tail[3:]
            if len(end) >= max(unsure, 1) and text.endswith(end):
                self.window = self.window[-self.KEEP :]
                self.given = tail[: -len(end)] + self.given[len(text) - len(end) :]
        return self._before_stop(new)

    def finish(self) -> str:
        """The text held back; U+FFFD for an unfinished character."""
        return self._before_stop(self._give(self.tokenizer.decode(self.window)), last=True)

    def _before_stop(self, new: str, last: bool = False) -> str:
        text = "" if self.stopped else self.held + new
        starts = (stop[:size] for stop in self.stops for size in range(1, len(stop)))
        held = 0 if last else max(map(len, filter(text.endswith, starts)), default=0)
        given, self.held = text[: len(text) - held], text[len(text) - held :]
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(found)
        return text[: min(found)[1]] if found else given

    def _give(self, text: str) -> str:
        shared = sum(takewhile(bool, map(eq, text, self.given)))
        self.given = text if len(text) > shared else self.given
        return text[shared:]
