"""Chat templates against Hugging Face's own renderer, idiom by idiom."""

# ruff: noqa: E501 (a template is one line)

import pytest

pytest.importorskip("transformers", reason="transformers is missing: pip install -e '.[torch]'")

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from hobbit_jax.model_file.chat_template import ChatTemplate

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

USER, SYSTEM = {"role": "user", "content": " Hi <b> é 🦙\n"}, {"role": "system", "content": "Brief"}
REPLY = {"role": "assistant", "content": "<think>a</think> So: "}
CONVERSATIONS = (
    ([USER], True), ([SYSTEM, USER], True), ([USER, REPLY, USER], True), ([SYSTEM, USER, REPLY], False),
)  # fmt: skip

# What public templates do, each on its own; those that fail do so there and here.
IDIOMS = {
    "tojson": "{{ messages | tojson }}",
    "tojson indent": "{{ messages | tojson(indent=4) }}",
    "tojson ascii": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "tojson sorted": "{{ {'b': 1, 'a': none} | tojson(sort_keys=true, indent='\t') }}",
    "tojson positional": "{{ messages | tojson(false, 2) }}",
    "tojson unknown argument": "{{ messages | tojson(allow_nan=false) }}",
    "tojson of undefined": "{{ nothing | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "generation keeps its names": "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "generation trims": "a {%- generation -%} b {%- endgeneration -%} c",
    "generation without an end": "{% generation %}x",
    "generation in a loop": "{% for m in messages %}{%- generation %}{{ loop.index0 }}{% endgeneration %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "raise": "{{ raise_exception('no') }}",
    "raise without words": "{{ raise_exception() }}",
    "tools": "{% if tools %}T{% else %}none{% endif %}{{ tools is none }}{{ tools is defined }}",
    "loop over no tools": "{% for tool in tools %}{{ tool }}{% endfor %}",
    "length of no tools": "{{ tools | length }}",
    "documents": "{{ documents is none }}{{ documents is defined }}",
    "bos": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "undefined plus text": "{{ 'a' + pad_token }}",
    "attribute of undefined": "{{ messages[0].tool_calls[0].name }}",
    "missing key": "{{ messages[0]['reasoning_content'] is defined }}",
    "missing index": "{{ messages[99].role }}",
    "get": "{{ messages[0].get('name', 'nobody') }}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "namespace of dunder": "{% set ns = namespace(__class__=1) %}",
    "set dunder": "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}",
    "dict of dunder": "{{ dict.__class__ }}",
    "strftime": "{{ strftime_now('%Y-%m') }}",
    "strftime of a number": "{{ strftime_now(5) }}",
    "macro": "{% macro show(m, last=false) %}[{{ m.role }}|{{ last }}]{% endmacro %}{% for m in messages %}{{ show(m, loop.last) }}{% endfor %}",
    "call block": "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}x{% endcall %}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "reverse": "{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}{{ messages | reverse | first }}",
    "string methods": "{{ messages[-1].content.split('</think>')[-1].lstrip('\n').strip() }}",
    "starts with": "{{ messages[0].content.startswith(' H') and not messages[0].content is iterable }}",
    "string test": "{{ messages[0].content is string }}{{ messages is sequence }}{{ messages[0] is mapping }}",
    "trim and escape": "{{ messages[0].content | trim }}{{ messages[0].content | escape }}{{ '<' | e }}",
    "indent": "{{ 'a\nb' | indent(2) }}{{ 'a' | upper }}{{ 3.0 | int }}",
    "concat": "{{ 'a' ~ 1 ~ none ~ true }}",
    "adding a number to text": "{{ 'a' + 1 }}",
    "division by zero": "{{ 1 / 0 }}{{ 1 % 0 }}",
    "huge range": "{% for i in range(10000000) %}{% endfor %}",
    "mutation": "{{ messages.append(1) }}",
    "do": "{% do messages %}",
    "unknown filter": "{{ messages | no_such_filter }}",
    "unknown test": "{{ messages is no_such_test }}",
    "unknown function": "{{ no_such_function() }}",
    "unclosed": "{% for m in messages %}",
    "unclosed expression": "{{ messages",
    "include": "{% include 'other' %}",
    "whitespace": "\n{% if true %}\n  {% if true %}\n x\n  {%- endif %}\n\n{% endif %}\n\n",
    "kept whitespace": "{%+ if true %} x {%+ endif %}\n y",
    "line comment": "{# a\n comment #}\nx{#- c -#}\n y",
    "raw": "{% raw %}{{ x }}{% endraw %}",
    "slices": "{{ messages[1:] | length }}{% if messages[0]['role'] == 'system' %}{% set m = messages[1:] %}{% endif %}{{ m | length }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "format": "{{ '%s-%d' | format('a', 3) }}{{ '{}'.format(1) }}",
    "internals": "{{ ''.__class__.__mro__ }}",
    "inline if without else": "{{ 'x' if false }}",
    "chained": "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}{%- endfor %}ok",
    "empty": "",
}  # fmt: skip


def hugging_face(source: str, messages: list, prompt: bool) -> str | None:
    """What Hugging Face renders; None where it fails. System messages go as in lm-eval."""
    try:
        return render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=source,
            add_generation_prompt=prompt,
            continue_final_message=not prompt,
            bos_token="<s>",
            eos_token="</s>",
        )[0][0]
    except Exception as error:
        others = [message for message in messages if message["role"] != "system"]
        if type(error) is TemplateError and len(others) < len(messages):
            return hugging_face(source, others, prompt)
        return None


def ours(source: str, messages: list, prompt: bool) -> str | None:
    try:
        return ChatTemplate(source, "<s>", "</s>").render(messages, prompt)
    except ValueError as error:
        assert str(error).startswith("the file's chat template") and "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_of_templates(name):
    source = "{# content #}" + IDIOMS[name]  # Hugging Face wants the word in one that goes on
    for messages, prompt in CONVERSATIONS:
        wanted = hugging_face(source, messages, prompt)
        assert ours(source, messages, prompt) == wanted, (messages, prompt)


@pytest.mark.parametrize(
    "shown",
    ["m.content", "m.content | trim", "m['content'].strip()", "m.content.split('</think>')[-1]",
     "m.content | upper", "m.content[:4]", "m.content.replace(' ', '')", "m.role", "m.content + ' '"],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", "</s>", "\n", " {{ eos_token }}", "{{ m.content }}"])
def test_a_last_message_goes_on_as_in_hugging_face(shown, end):
    source = "{# content #}{% for m in messages %}[{{ m.role }}] {{ " + shown + " }}" + end
    source += "{% endfor %}"
    for reply in ("So: ", " So", "So\n", "a</think> b ", "x"):
        messages = [USER, {"role": "assistant", "content": reply}]
        wanted = hugging_face(source, messages, False)
        assert ours(source, messages, False) == wanted, reply
