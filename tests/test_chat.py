"""Chats: the template's text and ids, the end of an answer, refusals in one line.

tests/real.py holds a real template and its tokens against transformers'.
"""

import json

import pytest
from test_tokenizer import byte_level, ours

from extras.chat import Chat

TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
[{{ m.role }}]{{ m.content }}{{ eos_token if m.role == "assistant" }}
{%- endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def checkpoint(path, template=TEMPLATE, make=byte_level):
    """A directory with a tokenizer and a template, which names BOS and EOS in both ways."""
    tokenizer = make(path)
    found = dict(bos_token={"content": "<bos>"}, eos_token="</s>")
    if make is ours:
        found = dict(bos_token="<s>", eos_token="</s>")
    (path / "tokenizer_config.json").write_text(json.dumps(found | dict(chat_template=template)))
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, ours])
def test_a_conversation_is_its_templates_ids(tmp_path, make):
    tokenizer = checkpoint(tmp_path, make=make)
    chat, bos, eos = Chat(tmp_path), tokenizer.bos, tokenizer.eos
    plain = lambda text: tokenizer.encode(text, bos=False)
    assert chat.ends == (eos,)
    first = [bos, *plain("[user]hello[assistant]")]
    assert chat.ask("hello") == first and chat.ask("hello") == first  # asking keeps nothing
    chat.keep("hello", "hi")
    said = [bos, *plain("[user]hello[assistant]hi"), eos, *plain("[user]go[assistant]")]
    assert chat.ask("go") == said


def test_a_file_of_its_own_comes_first(tmp_path):
    tokenizer = checkpoint(tmp_path, [dict(name="tools"), dict(name="default", template="x")])
    assert Chat(tmp_path).ask("a") == tokenizer.encode("x", bos=False)
    (tmp_path / "chat_template.jinja").write_text("y")
    assert Chat(tmp_path).ask("a") == tokenizer.encode("y", bos=False)
    assert Chat(tmp_path).ends == ()


@pytest.mark.parametrize("template, reason", [
    (None, "has no chat template"),
    ([7, dict(name="tools", template="x")], "has no chat template"),
    ("{% if %}", "is damaged"),
    ("{{ raise_exception('roles must alternate') }}", "refuses this: roles must alternate"),
    ("{{ messages.clear() }}", "refuses this"),
    ("{{ 1 / 0 }}", "refuses this"),
    ("{{ ''.__class__.__mro__ }}", "refuses this"),
    ("{{ 'a' * 10**12 }}", "refuses this"),
])  # fmt: skip
def test_a_useless_template_is_one_line(tmp_path, template, reason):
    checkpoint(tmp_path, template)
    with pytest.raises(ValueError, match=reason) as refused:
        Chat(tmp_path).ask("a")
    assert "\n" not in str(refused.value)
