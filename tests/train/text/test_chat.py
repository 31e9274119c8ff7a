"""Chat templates: what the assistant says in them, and what a stranger's program may not do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.records import Message
from train.text.chat import BUILT_IN, Template

TALK = (
    Message("system", "Be brief."),
    Message("user", "1+1?"),
    Message("assistant", "2"),
    Message("user", "2+2?"),
    Message("assistant", "It is 4."),
)
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "text_start": "<s>"}


def template(source: str) -> Template:
    return Template(source, "it", VARIABLES)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates_mark_every_answer_and_its_end(name):
    chat = template(BUILT_IN[name]).spans(TALK)
    assert chat.spans[0] is chat.spans[1] is chat.spans[3] is None
    said = [chat.text[slice(*span)] for span in chat.spans if span]
    assert len(said) == 2
    for part, content in zip(said, ("2", "It is 4."), strict=True):
        assert part.strip().startswith(content)
        assert len(part.strip()) > len(content)  # what ends the turn
    prompt = template(BUILT_IN[name]).render(TALK[:4], prompt=True)
    assert chat.text.startswith(prompt)
    assert chat.text[len(prompt) :] == said[1]


def test_a_built_in_template_is_laid_out_as_the_family_does():
    rendered = template(BUILT_IN["gemma"]).render(TALK[:3], prompt=False)
    assert rendered == (
        "<s><start_of_turn>user\nBe brief.\n\n1+1?<end_of_turn>\n<start_of_turn>model\n2"
        "<end_of_turn>\n"
    )
    assert (
        template(BUILT_IN["mistral"]).render(TALK[:3])
        == "<s>[INST] Be brief.\n\n1+1? [/INST] 2</s>"
    )


def test_generation_blocks_say_where_answers_are():
    source = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    chat = template(source).spans(TALK)
    assert [chat.text[slice(*span)] for span in chat.spans if span] == ["2</s>", "It is 4.</s>"]
    assert chat.text == template(source).render(TALK)
    none = source.replace("{% generation %}", "{% if true %}").replace("endgeneration", "endif")
    with pytest.raises(ValueError, match="does not begin an answer as it prompts for one"):
        template("{% if add_generation_prompt %}x{% endif %}" + none).spans(TALK)


THINKING = """
{%- set last = namespace(question=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in m.content %}
            {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- m.content.split('</think>')[-1].lstrip('\n') }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""As Qwen 3 does: thoughts go from the answers before the last question, and the last answer gets
an empty one if it has none."""


def thinking(messages: Sequence[Message]) -> tuple[str, list[tuple[int, int] | None]]:
    """The same without a template: the text, and where the answers are."""
    last = max(i for i, message in enumerate(messages) if message.role == "user")
    text, spans = "", []
    for i, message in enumerate(messages):
        text += f"<|im_start|>{message.role}\n"
        if message.role != "assistant":
            text += f"{message.content}<|im_end|>\n"
            spans.append(None)
            continue
        start = len(text)
        thoughts, closed, said = message.content.rpartition("</think>")
        thought = thoughts.split("</think>")[0].split("<think>")[-1].strip("\n") if closed else ""
        if i > last and (i == len(messages) - 1 or thought):
            text += f"<think>\n{thought}\n</think>\n\n"
        text += said.lstrip("\n") + "<|im_end|>\n"
        spans.append((start, len(text)))
    return text, spans


ANSWERS = (
    "a",
    "aa",
    "",
    " a\n",
    "\n\na",
    "<think>\nwhy\n</think>\n\na",
    "<think>\n\n</think>\n\na",
    "<think>a</think>",
    "</think>",
    "a<|im_end|>\n",
    "<|im_end|>\n<|im_start|>assistant\na",
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
)


@st.composite
def conversations(draw):
    messages = [Message("system", draw(st.sampled_from(ANSWERS)))] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(st.sampled_from(ANSWERS))))
        said = draw(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=2))
        messages += [Message("assistant", content) for content in said]
    return messages


@given(conversations())
def test_answers_are_told_though_earlier_ones_are_written_otherwise(messages):
    chat = template(THINKING).spans(messages)
    text, spans = thinking(messages)
    assert chat.text == text
    assert list(chat.spans) == spans


def test_three_equal_answers_are_told_apart():
    turn = (Message("user", "a"), Message("assistant", "a"))
    chat = template(THINKING).spans(turn * 3)
    said = [chat.text[slice(*span)] for span in chat.spans if span]
    assert said == ["a<|im_end|>\n", "a<|im_end|>\n", "<think>\n\n</think>\n\na<|im_end|>\n"]
    assert len(set(chat.spans)) == 4  # they are three places, and None


def test_answers_are_told_though_questions_before_them_are_written_otherwise():
    # As Mistral's later templates: the system's words stand in the last question.
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.index0 >= messages|length - 2 %}{{ messages[0].content }}: {% endif %}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    chat = template(source).spans(TALK)
    assert chat.text == "[INST] 1+1?[/INST] 2</s>[INST] Be brief.: 2+2?[/INST] It is 4.</s>"
    assert [chat.text[slice(*span)] for span in chat.spans if span] == [" 2</s>", " It is 4.</s>"]


def test_a_template_that_looks_at_the_words_of_a_greeting_is_not_asked_with_others():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content|length < 2 %}"
        "{{ raise_exception('too short') }}{% endif %}<{{ m.role }}>{{ m.content }}<end>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = [Message("assistant", "hello"), Message("user", "a"), Message("assistant", "bb")]
    found = template(source).spans(talk)
    assert [found.text[slice(*span)] for span in found.spans if span] == ["hello<end>", "bb<end>"]


def test_what_is_repeated_without_end_is_not_made():
    for source in ("{{ 'a' * 1500000000 }}", "{{ 2000000000 * messages }}"):
        with pytest.raises(ValueError, match=r"it repeats something [0-9,]+ times"):
            template(source).spans(TALK)


def test_a_greeting_begins_behind_what_the_template_writes_before_it():
    greeting = (Message("assistant", "a"), *TALK[1:])  # as in "<|im_start|>"
    chat = template(BUILT_IN["chatml"]).spans(greeting)
    assert chat.text[slice(*chat.spans[0])] == "a<|im_end|>\n"
    alone = template(THINKING).spans([Message("assistant", "<think>\nwhy\n</think>\n\na")])
    assert alone.text[slice(*alone.spans[0])].startswith("<think>\nwhy")


@pytest.mark.parametrize(
    "earlier",
    [
        "{{ m.role }}{{ '\n' }}{{ m.content }}",  # not as it is prompted for
        "{{ m.role }}\n<think>\n{{ m.content }}.{{ m.content | length // 2 }}",  # by its words
        "{{ m.role }}\n<think>\n{{ m.content }}!",  # ends otherwise than the last one
    ],
)
def test_turns_that_cannot_be_told_have_no_span(earlier):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}" + earlier + "</s>"
        "{% else %}{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}"
        "{% if m.role == 'assistant' %}.{% endif %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant\n<think>\n{% endif %}"
    )
    chat = template(source).spans(TALK)
    assert chat.spans[2] is None
    assert chat.text[slice(*chat.spans[4])] == "It is 4..</s>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this: roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses this: access to attribute"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses this: access to attribute"),
        ("{{ messages.append(1) }}", "refuses this"),
        ("{% for i in range(1000000) %}x{% endfor %}", "refuses this: Range too big"),
        ("{{ 1 / 0 }}", "refuses this: division by zero"),
        ("{{ messages[99].content.x }}", "refuses this"),
        ("{% include '/etc/passwd' %}", "refuses this"),
    ],
)
def test_a_template_that_raises_or_reaches_out_is_refused(source, message):
    with pytest.raises(ValueError, match=message) as raised:
        template(source).render(TALK)
    assert "the chat template of it" in str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{% for m in messages %}" * 25 + "{% endfor %}" * 25,  # too many for Python
        "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_template_that_is_no_jinja_is_refused(source):
    with pytest.raises(ValueError, match=r"^the chat template of it is not valid jinja: [^\n]+$"):
        template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
        "{% for i in range(99999) %}{% for i in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_writes_without_end_is_stopped(source):
    with pytest.raises(ValueError, match=r"^the chat template of it writes more than 1,000,300 "):
        template(source).render([Message("user", "x" * 30)])
    long = Message("assistant", "x" * 3_000_000)  # is no fault of the template's
    assert len(template(BUILT_IN["chatml"]).spans([Message("user", "?"), long]).text) > 3_000_000


def test_a_template_that_writes_half_a_character_is_refused():
    source = "{% for m in messages %}{{ '\\ud800' }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"^what the chat template of it writes holds half of"):
        template(source).spans(TALK)


def test_helpers_that_templates_of_checkpoints_call():
    assert template("{{ strftime_now('%d %b %Y') }}").render(TALK) == "26 Jul 2024"
    assert template("{{ messages[0] | tojson }}").render(TALK).startswith('{"role": "system"')
    assert template("{{ {'a': '<é>'} | tojson }}").render(TALK) == '{"a": "<é>"}'
    assert template("{% for m in messages %}{% break %}{% endfor %}.").render(TALK) == "."
