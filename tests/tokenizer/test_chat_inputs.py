"""What callers may send to chat templates, and the files that templates come from."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_cases import SMALL, TOOLS, said, text_of

from sharded_llama.errors import RequestError, TokenizerError
from sharded_llama.tokenizer.chat import load_chat_template, render
from sharded_llama.tokenizer.chat.messages import MAX_CHARS, MAX_VALUES
from sharded_llama.tokenizer.chat.template import MAX_TEMPLATE_CHARS


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of 1 to 4096"),
        ("hello", "messages must be a list"),
        ([{"role": "user", "content": "a"}] * 4097, "messages must be a list of 1 to 4096"),
        (["a"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\]\.role must be a string"),
        ([{"role": 1, "content": "a"}], r"messages\[0\]\.role must be a string"),
        ([{"role": "user<|eot_id|>", "content": "a"}], r"messages\[0\]\.role must be a string"),
        ([{"role": "user\n", "content": "a"}], r"messages\[0\]\.role must be a string"),
        ([{"role": "u" * 65, "content": "a"}], r"messages\[0\]\.role must be a string"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a string or a list of text parts, not int"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\]\.content\[0\] must be"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "a"}]}], r"messages\[0\]\.content\[0\] must be"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\]\.content is not valid Unicode: .* index 1"),
        ([{"role": "user", "content": "a", "x": {1: 2}}], r"messages\[0\]\.x: a name in an object must be a string"),
        ([{"role": "user", "content": "a", "x": b""}], r"messages\[0\]\.x is no value of JSON.*bytes"),
        ([{"role": "user", "content": "a", "x": 1 << 300}], r"messages\[0\]\.x is no value of JSON"),
        ([{"role": "user", "content": "a", "x": float("nan")}], r"messages\[0\]\.x is no value of JSON"),
        ([{"role": "user", "content": "a", "x": [0] * MAX_VALUES}], r"messages\[0\]\.x\[.*more than 100000"),
        ([{"role": "user", "content": "a" * MAX_CHARS}], r"messages\[0\]\..*more than 4194304 characters"),
    ],
)  # fmt: skip
def test_malformed_messages(messages, message):
    with pytest.raises(RequestError, match=message):
        text_of("{{ messages[0].content }}", messages)


def test_nesting_is_bounded():
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested more than 32 deep"):
        text_of("{{ messages[0].content }}", [{"role": "user", "content": "a", "x": deep}])


def test_tools_and_variables_are_checked():
    with pytest.raises(RequestError, match="tools must be a list of at most"):
        text_of("", tools="x")
    with pytest.raises(RequestError, match=r"tools\[1\] must be an object"):
        text_of("", tools=[{}, "x"])
    for name in ("messages", "bos_token", "eos_token", "tools", "raise_exception", "range", "__class__", "a b"):
        with pytest.raises(RequestError, match="is not a name that a caller may give"):
            text_of("{{ messages[0].content }}", variables={name: "x"})
    assert text_of("{{ note ~ documents[0].text }}", variables={"note": 1, "documents": [{"text": "t"}]}) == "1t"


# Files.


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        name = name.replace("_jinja", ".jinja").replace("_json", ".json")
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_where_templates_come_from(tmp_path):
    write(tmp_path, tokenizer_config_json={"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}})
    assert load_chat_template(tmp_path) is None
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "config {{ bos_token }}"}
    write(tmp_path, tokenizer_config_json=config, special_tokens_map_json={"eos_token": "<old>", "pad_token": "<pad>"})
    template = load_chat_template(tmp_path)
    assert template.source == "config {{ bos_token }}"
    assert template.tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write(tmp_path, chat_template_json={"chat_template": "json"})
    assert load_chat_template(tmp_path).source == "json"
    write(tmp_path, chat_template_jinja="jinja\r\n")
    assert load_chat_template(tmp_path).source == "jinja\n"
    file = write(tmp_path, other_jinja="file") / "other.jinja"
    assert load_chat_template(tmp_path, file).source == load_chat_template(tmp_path, str(file)).source == "file"
    given = load_chat_template(tmp_path, "{{ eos_token }}")
    assert render(given, said(("user", "x")), special=SMALL)[0].text == "</s>"


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, tokenizer_config_json={"chat_template": [*named, {"name": "rag", "template": "rag"}]})
    template = load_chat_template(tmp_path)
    messages = said(("user", "x"))
    assert render(template, messages, special=SMALL)[0].text == "plain"
    assert render(template, messages, special=SMALL, tools=TOOLS)[0].text == "tools"
    assert load_chat_template(tmp_path, name="rag").source == "rag"
    with pytest.raises(TokenizerError, match=r"no chat template named 'x'; it has \['default', 'rag', 'tool_use'\]"):
        load_chat_template(tmp_path, name="x")
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path / "additional_chat_templates", rag_jinja="more rag")
    write(tmp_path, chat_template_jinja="default")
    assert load_chat_template(tmp_path, name="rag").source == "more rag"
    assert load_chat_template(tmp_path).source == "default"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config_json": {"chat_template": 3}}, "tokenizer_config.json: chat_template must be a text"),
        ({"tokenizer_config_json": {"chat_template": []}}, "tokenizer_config.json: chat_template must be a text"),
        ({"tokenizer_config_json": {"chat_template": [{"name": "default"}]}}, "must have a name and a template"),
        ({"tokenizer_config_json": {"chat_template": [{"name": "x", "template": "y"}]}}, "no chat template named"),
        ({"tokenizer_config_json": {"chat_template": "x", "bos_token": 3}}, "bos_token must be a text"),
        ({"tokenizer_config_json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"chat_template_jinja": "{{"}, "chat_template.jinja, line 1: "),
        ({"chat_template_jinja": "x" * (MAX_TEMPLATE_CHARS + 1)}, "at most 131072 characters"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(TokenizerError, match=message):
        load_chat_template(tmp_path)
    with pytest.raises(TokenizerError, match="is not a file"):
        load_chat_template(write(tmp_path, tokenizer_config_json={}), tmp_path / "absent.jinja")
