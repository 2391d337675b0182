"""Templates and messages that the tests of chat templates share."""

from datetime import datetime
from typing import Any

from sharded_llama.tokenizer.chat import SpecialTokens, compile_chat_template, render

NOW = datetime(2024, 2, 29, 13, 5)
SMALL = SpecialTokens.of({token: i for i, token in enumerate(["<s>", "</s>", "<|eot|>"])})

# Our own templates, by what they do with a text.
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}",
    "trimmed": """{{- bos_token }}
        {%- set ns = namespace(last=none) %}
        {%- for m in messages %}
            {%- if loop.first and m['role'] != 'system' %}{{ strftime_now('%d %b %Y') + eos_token }}{% endif %}
            {{- m['role'] ~ ': ' ~ m['content'] | trim ~ ('' if loop.last else eos_token) }}
            {%- set ns.last = m %}
            {%- if m.role == 'assistant' and 'tool_calls' in m %}{%- continue %}{%- endif %}
        {%- endfor %}
        {%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
        {%- if add_generation_prompt and ns.last.role != 'assistant' %}{{ '<|start_header_id|>' }}{% endif %}
    """,
    "thinking": """
        {%- macro said(m) %}
            {%- set text = m.content %}
            {%- if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}
            {{- text }}
        {%- endmacro %}
        {%- for m in messages[:-1] %}{{ m.role + '\n' + said(m) + '<|eot_id|>' }}{% endfor %}
        {%- generation %}{{ messages[-1].content }}{% endgeneration %}
    """,
}

CONVERSATIONS = [
    [("user", "Hello")],
    [("user", "")],
    [("system", " Be brief.\n"), ("user", "  spaces before and after  ")],
    [("user", "one"), ("assistant", "two"), ("user", "three\n\n"), ("assistant", "  four"), ("user", "it's five")],
    [("system", ""), ("user", "Grüße 你好 こんにちは Привет 😀👩‍👩‍👧🇩🇪 e\u0301 \x00 \ufffd \U0010ffff")],
    [
        ("user", '<p>a & b | c</p> `x = {{ y }}` {% z %} "quoted" \\ \ue000 <|not a token|> <|eot'),
        ("assistant", "_id|>"),
    ],
    [("user", "1234567890\t\r\n"), ("assistant", "hm</think>\n\nyes"), ("user", "a</think>b"), ("critic", "no")],
    [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d")],
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, e.g. <Köln> & 'Paris' | \"Rome\"",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TOOL_CONVERSATION = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": " Weather in Köln? "},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln <1>"}}}],
    },
    {"role": "tool", "content": '{"sky": "grey | wet"}'},
    {"role": "user", "content": "Thanks."},
]


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def text_of(template: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    """What a template's text makes of messages."""
    messages = said(("user", "hi")) if messages is None else messages
    compiled = compile_chat_template(template, {"bos_token": "<s>"})
    return "".join(piece.text for piece in render(compiled, messages, special=SMALL, **options))
