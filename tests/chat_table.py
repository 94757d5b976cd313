"""Chat templates in their published form, tokenizers of three kinds, conversations: a table.

tests/parity.py compares all of it with transformers; test_chat_templates.py needs no transformers.
"""
# ruff: noqa: RUF001

import io
import json
from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = {
    "Llama 2": """{% if messages[0]['role'] == 'system' %}
{% set turns = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set turns = messages %}
{% set system = '' %}
{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('after a user comes an assistant, then a user') }}
{% endif %}
{% set content = system + message['content'] if loop.first else message['content'] %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}""",
    "Llama 3.1": """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "ChatML": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "DeepSeek": """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}""",
    "generation tag, JSON": """{% for m in messages if m.role != 'system' %}
{% if m.role == 'user' %}{{ m | tojson(sort_keys=true) }}{% else %}
{% generation %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}
{% endif %}
{% endfor %}
{{ '<|assistant|>' if documents is none and not pad_token }}""",
}
SPECIAL = ["<unk>", "<s>", "</s>"]
ADDED = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ADDED += ["<|im_start|>", "<|im_end|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
PLAIN = ["<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]  # added, not special
TEXT = "the quick brown fox jumps over the lazy dog [INST] hi [/INST] <<SYS>> <</SYS>> system user "
TEXT += 'assistant Cutting Knowledge Date: December 2023 Today Date "role": "content" </s> im_end'


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: a user and an assistant take turns, perhaps after a system message."""
    roles = ("user", "assistant") * len(contents)
    turns = [dict(role=role, content=content) for role, content in zip(roles, contents)]
    return turns if system is None else [dict(role="system", content=system), *turns]


CONVERSATIONS = {
    "a message": said("hi"),
    "turns": said("hi", "the fox", "  the\n lazy dog \n", "jumps", "over"),
    "other letters": said("漢字 é\u00a0😀", "ö\u2028\t", "\u2581the\u2581 \ufffd"),
    "a system message": said("hi", "the fox", "go", system="the quick brown fox"),
    "empty messages": said("", "", "", system=""),
    "white space": said(" ", "\n", "\n\n ", system=" \n"),
    "no alternation": [*said("hi"), *said("again")],
    "a special token": said("a</s>b"),
    "special tokens at the ends": said("</s> the ", " fox<|im_end|>", "<s>"),
    "special tokens in a row": said("<s><s></s></s", "</s</s>", "<|im_end|>\n<|im_start|>system"),
    "a special token in a system message": said("hi", system="the <|end_header_id|> fox</s> "),
    "added tokens": said("<|user|>\n<think>", "a </think> b</think>c", "<｜User｜> go\n<|user|>"),
}


def configure(path: Path, found: dict) -> None:
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (path / "tokenizer_config.json").write_text(json.dumps(names | found))


def write_json(path: Path, model: Tokenizer, trainer: trainers.Trainer, **how: bool) -> None:
    """A tokenizer.json with the special and the added tokens; `how` is told of the special ones."""
    model.train_from_iterator([TEXT] * 4, trainer)
    found = json.loads(model.to_str())
    found["added_tokens"] = []  # the trainer's: bytes are no added tokens
    model = Tokenizer.from_str(json.dumps(found))
    special = [AddedToken(t, normalized=False, special=True, **how) for t in SPECIAL + ADDED]
    model.add_special_tokens(special)
    model.add_tokens(PLAIN)
    model.save(str(path / "tokenizer.json"))
    configure(path, {"tokenizer_class": "PreTrainedTokenizerFast"})


def byte_level(path: Path, **how: bool) -> None:
    """As Llama 3's."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters, show_progress=False)
    write_json(path, model, trainer, **how)


def metaspace(path: Path, scheme: str = "first") -> None:
    """As Llama 2's."""
    names = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    write_json(path, model, trainer)


def write_pieces(path: Path, **options: object) -> None:
    """A tokenizer.model with byte fallback."""
    model, text = io.BytesIO(), iter([TEXT] * 4)
    usual = dict(model_type="bpe", vocab_size=380, byte_fallback=True, minloglevel=2)
    how: dict = dict(sentence_iterator=text, model_writer=model) | usual | options
    SentencePieceTrainer.Train(**how)
    (path / "tokenizer.model").write_bytes(model.getvalue())


def sentencepiece(path: Path, **config: bool) -> None:
    """As Llama 2's, and added tokens in tokenizer_config.json."""
    write_pieces(path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    flags = dict(lstrip=False, rstrip=False, single_word=False, normalized=False)
    told = {
        i: flags | dict(content=text, special=text not in PLAIN)
        for i, text in [*enumerate(SPECIAL), *enumerate(ADDED + PLAIN, 380)]
    }
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": told, **config}
    configure(path, config)


KINDS: dict[str, Callable[[Path], None]] = {
    "byte level": byte_level,
    "byte level, tokens take white space": lambda path: byte_level(path, lstrip=True, rstrip=True),
    "Metaspace": metaspace,
    "Metaspace before every part": lambda path: metaspace(path, "always"),
    "sentencepiece": lambda path: sentencepiece(path, legacy=False),
    "sentencepiece, legacy": lambda path: sentencepiece(path, legacy=True),
}
