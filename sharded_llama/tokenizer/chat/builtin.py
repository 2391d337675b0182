"""The chat template for checkpoints of Meta's, whose folders have none."""

# What Llama 3.1 to 3.3 were trained on: a first message that says the dates, then role and text of each message.
LLAMA3_TEMPLATE = r"""
{%- macro text(content) -%}
    {{- (content if content is string else content | map(attribute="text") | join) | trim -}}
{%- endmacro -%}
{%- macro refuse_tools() -%}
    {{- raise_exception("the built-in template of Llama 3 has no tools; give the checkpoint's own template") -}}
{%- endmacro -%}
{%- macro turn(role, text) -%}
    {{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" ~ text ~ "<|eot_id|>" -}}
{%- endmacro -%}
{%- if tools -%}
    {{- refuse_tools() -}}
{%- endif -%}
{%- set has_system = messages[0].role == "system" -%}
{%- set today = date_string | default("26 Jul 2024") -%}
{%- set dates = "Cutting Knowledge Date: December 2023\nToday Date: " ~ today ~ "\n\n" -%}
{{- bos_token ~ turn("system", dates ~ (text(messages[0].content) if has_system else "")) -}}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message.tool_calls is defined or message.role in ("tool", "ipython") -%}
        {{- refuse_tools() -}}
    {%- endif -%}
    {{- turn(message.role, text(message.content)) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" -}}
{%- endif -%}
"""
