"""Chat templates: rendered as Hugging Face would, and worn by the prompts of a benchmark."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install -e '.[eval]'")

from lm_eval_oracles import EOS, Scripted, requests, scripted_lm, write_one_layer

from hobbit_jax.evals import tasks as direct_tasks
from hobbit_jax.evals.benchmarks import BenchmarkSettings, evaluate
from hobbit_jax.model_file.chat_template import ChatTemplate
from hobbit_jax.model_file.gguf_file import open_gguf, write_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.synthetic_tasks import arithmetic

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}\n"
    "{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system here') }}{% endif %}[{{ m.role }}]{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if loop.last %}{% break %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER, REPLY = {"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": " So: "}
SYSTEM = {"role": "system", "content": "Be brief"}


def test_chat_templates():
    chatml = ChatTemplate(CHATML, "<s>", "</s>")
    opened = "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    assert chatml.render([USER]) == opened
    assert chatml.render([USER, REPLY], False) == opened + " So: "
    strict = ChatTemplate(STRICT, "<s>", "</s>")
    assert strict.render([SYSTEM, USER]) == "<s>[user]Hi <b>[assistant]"
    assert strict.render([USER, REPLY], False) == "<s>[user]Hi <b>[assistant]So:"
    indented = "{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n"
    assert ChatTemplate(indented, "", "").render([USER]) == "x\n"
    assert ChatTemplate("{{ messages | tojson }}", "", "").render([USER]) == json.dumps([USER])
    pretty = "{{ messages | tojson(indent=2, sort_keys=true, ensure_ascii=false) }}"
    assert ChatTemplate(pretty, "", "").render([USER]) == (
        '[\n  {\n    "content": "Hi <b>",\n    "role": "user"\n  }\n]'
    )
    marked = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    )
    assert ChatTemplate(marked, "", "").render([USER, REPLY]) == "Hi <b>| So: |"
    assert ChatTemplate("{{ bos_token is defined }}", None, "").render([USER]) == "False"
    with pytest.raises(ValueError, match="the file's chat template: no tools"):
        ChatTemplate("{{ raise_exception('no tools') }}", "", "").render([USER])
    with pytest.raises(ValueError, match="access to attribute"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", "", "").render([USER])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for tool in tools %}{% endfor %}", "TypeError: 'NoneType' object is not iterable"),
        ("{{ messages[0].tool_calls[0] }}", "has no attribute 'tool_calls'"),
        ("{{ {}['a'].b }}", "has no attribute 'a'"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages | tojson(allow_nan=false) }}", "TypeError"),
        ("{{ raise_exception() }}", "TypeError"),
        ("{{ strftime_now(1) }}", "TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% set n = namespace(__x=1) %}", "SecurityError|namespace may not keep '__x'"),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{% generation %}", "Unexpected end of template.*line 1"),
        ("{{ messages", "unexpected end of template.*line 1"),
        ("{{ 1 | no_such_filter }}", "No filter named 'no_such_filter'"),
    ],
)
def test_whatever_fails_in_a_template_is_one_line(source, reason):
    with pytest.raises(ValueError, match=rf"^the file's chat template: .*({reason})") as caught:
        ChatTemplate(source, "<s>", "</s>").render([USER])
    assert "\n" not in str(caught.value)


def test_the_files_template_wraps_the_prompts(tmp_path):
    """BOS stands once, the few-shot examples are turns, and a file without a template says so."""
    plain = open_gguf(write_one_layer(tmp_path))
    with pytest.raises(ValueError, match=r"no tokenizer.chat_template; it has no chat template"):
        ChatTemplate.from_gguf(plain, Tokenizer(plain))
    metadata = {
        **plain.metadata,
        "tokenizer.chat_template": STRICT,
        "tokenizer.chat_template.other": CHATML,
        "tokenizer.ggml.bos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 65,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],  # "he" is a control token here
    }
    path = tmp_path / "chat.gguf"
    tensors = [(t.name, t.format, t.shape, t.raw) for t in plain.tensors.values()]
    write_gguf(path, metadata, tensors)
    file = open_gguf(path)
    chatty = Tokenizer(file)
    chat = ChatTemplate.from_gguf(file, chatty)
    assert ChatTemplate.from_gguf(file, chatty, "other").source == CHATML
    with pytest.raises(ValueError, match=r"no tokenizer.chat_template.tool; it has tokenizer.chat"):
        ChatTemplate.from_gguf(file, chatty, "tool")
    lm = scripted_lm(chatty, lambda _: "x", chat=chat)
    problems = arithmetic.generate(direct_tasks.HELD_OUT_SEED, 1, "heldout")
    evaluate(lm, BenchmarkSettings(("mini_arithmetic",), 1, chat_template=True), None)
    ((row,), _, _, _) = lm._engine.calls[0]
    assert row.count(EOS) == 1 and row[0] == EOS
    assert chatty.decode(row[1:]) == f"[user]{problems[0].prompt}[assistant]"
    assert (
        chatty.encode("[user]") == lm.tok_encode("[user]") == [EOS, *lm.tok_encode("[user]", False)]
    )
    # A stop string that is a token ends a generation, as the file's own end tokens do.
    assert chatty.eog_ids == (65, EOS)
    engine = Scripted(chatty, lambda _: "x")
    assert direct_tasks.complete(engine, chatty, ["p"], [5]) == ["x"]
    assert engine.calls[-1][3] == chatty.eog_ids
    lm = scripted_lm(chatty, lambda _: "she said")
    for stops, wanted, written in ([["he"], [65, 256, EOS], "s"], [["sa"], [65, EOS], "s "]):
        asked = requests("generate_until", ("p", {"until": stops}))
        assert lm.generate_until(asked) == [written]
        assert lm._engine.calls[-1][3] == wanted
    with pytest.raises(ValueError, match="made without one"):
        scripted_lm(chatty, None).apply_chat_template([USER])
