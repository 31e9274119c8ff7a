"""Chat templates: messages to text, and which part of it the assistant says.

A template is a program that came with a checkpoint. It runs in jinja's sandbox, which lets it read
the messages and write text, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from train.data.records import Message

TODAY = datetime.datetime(2024, 7, 26)
"""What a template that asks is told (Llama 3.2's own default), so that runs are repeatable."""
MOST_AROUND, MOST_TIMES = 1_000_000, 10
"""Characters that a template may write of its own, and times that it may write the messages. One
that repeats itself would fill the memory."""

BUILT_IN: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% set before = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set before.text = message['content'] | trim + '\n\n' %}{% else %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
        "{{ before.text + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% set before.text = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set before = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set before.text = message['content'] + '\n\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + before.text + message['content'] + ' [/INST]' }}"
        "{% set before.text = '' %}"
        "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{{ text_start }}{{ 'Below is an instruction that describes a task. Write a response that"
        " appropriately completes the request.\n\n' }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "plain": (
        "{{ text_start }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates of the families, for checkpoints without one; alpaca's and none for base models."""
MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""The tokens that a template is made of. A tokenizer without them cannot use it."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    """Of each message: start and end of what is written once it is the assistant's turn, in
    characters; None for what others say, and where the template does not let it be told."""


class _Environment(ImmutableSandboxedEnvironment):
    """In which no text is repeated into more than a template may write."""

    intercepted_binops = frozenset({"*"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for some, times in ((left, right), (right, left)):
            if (
                isinstance(some, str | list | tuple)
                and isinstance(times, int)
                and len(some) * times > MOST_AROUND
            ):
                raise jinja2.TemplateRuntimeError(f"it repeats something {times:,} times")
        return super().call_binop(context, operator, left, right)


class Template:
    """A chat template.

    Args:
      source: the jinja program.
      where: whose it is, for messages.
      variables: what it may use besides the messages: bos_token, eos_token, ….

    Raises:
      ValueError: if it is not valid jinja.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._where = where
        self._variables = dict(variables)
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = TODAY.strftime
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Python's too: what is nested too deeply, it cannot compile
            raise ValueError(
                f"the chat template of {where} is not valid jinja: {_reason(error)}"
            ) from None
        self._tells_spans = re.search(r"{%-?\s*generation\b", source) is not None

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation, or with `prompt` all before the assistant's next words.

        Raises:
          ValueError: if the template refuses it, with its words, or writes without end.
        """
        return self._render(messages, prompt).translate(_NO_MARKS)

    def spans(self, messages: Sequence[Message]) -> Rendered:
        """The conversation with the assistant's spans.

        A template with `{% generation %}` blocks says itself where they are. Of another, a turn
        begins where the conversation before it, with the prompt to answer, ends, and ends where the
        conversation up to it does, if that is how the whole begins. A template that writes earlier
        turns otherwise than the last (Qwen 3's gives the last a thought) is asked for the whole
        once more, with other words in place of a message: what stands behind them must be what
        ends the whole, and begin with what ends that message where it is the last one. A turn that
        cannot be told so has no span; the last one must have one.

        Raises:
          ValueError: if the template refuses the conversation, or the last turn cannot be told.
        """
        marked = self._render(messages, prompt=False)
        if self._tells_spans:
            return self._marked_spans(messages, marked)
        spans = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                spans.append(None)
                continue
            last = i == len(messages) - 1
            span = self._span(messages, i, marked)
            if span is None and last:
                raise ValueError(
                    f"the chat template of {self._where} does not begin an answer as it prompts for"
                    " one, so the loss cannot be told from the prompt: name another --template"
                )
            spans.append(span)
        return Rendered(marked, tuple(spans))

    def _span(self, messages: Sequence[Message], i: int, text: str) -> tuple[int, int] | None:
        start = self._start(messages, i, text)
        end = len(text) if i == len(messages) - 1 else self._end(messages, i, text)
        return None if start is None or end is None or start > end else (start, end)

    def _start(self, messages: Sequence[Message], i: int, text: str) -> int | None:
        if i == 0:  # a greeting, before which there is nothing to render
            with contextlib.suppress(ValueError):  # by a template that looks at the words
                before, found, after = self.render(_with_other_words(messages, 0)).partition(_WORDS)
                if found and text.startswith(before) and text.endswith(after):
                    return len(before)
            content = messages[0].content.strip()
            return text.index(content) if content and text.count(content) == 1 else None
        before = self.render(messages[:i], prompt=True)
        if text.startswith(before):
            return len(before)
        return self._behind(messages, i - 1, text, prompt=True)

    def _end(self, messages: Sequence[Message], i: int, text: str) -> int | None:
        upto = self.render(messages[: i + 1])
        if text.startswith(upto):
            return len(upto)
        return self._behind(messages, i, text, prompt=False)

    def _behind(
        self, messages: Sequence[Message], i: int, text: str, *, prompt: bool
    ) -> int | None:
        """Where message i ends in the text of all of them, and with `prompt` the prompt behind it;
        None if that is not certain."""
        other = _with_other_words(messages, i)
        try:
            whole, alone = self.render(other), self.render(other[: i + 1], prompt=prompt)
            if prompt and not alone.startswith(self.render(other[: i + 1])):
                return None  # prompts elsewhere than at the end
        except ValueError:  # by a template that looks at the words
            return None
        after, ending = whole.partition(_WORDS)[2], alone.partition(_WORDS)[2]
        once = whole.count(_WORDS) == alone.count(_WORDS) == 1
        if not (once and ending and after.startswith(ending) and text.endswith(after)):
            return None
        return len(text) - len(after) + len(ending)

    def _marked_spans(self, messages: Sequence[Message], marked: str) -> Rendered:
        first, *parts = marked.split(_START)
        text, blocks = first, []
        for part in parts:
            inside, _, after = part.partition(_END)
            blocks.append((len(text), len(text) + len(inside)))
            text += inside + after
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if len(blocks) != len(turns):
            raise ValueError(
                f"the chat template of {self._where} has {len(blocks)} {{% generation %}} blocks"
                f" for {len(turns)} turns of the assistant"
            )
        found = dict(zip(turns, blocks, strict=True))
        return Rendered(text, tuple(found.get(i) for i in range(len(messages))))

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        given = sum(len(message.content) for message in messages)
        most, written, length = MOST_AROUND + MOST_TIMES * given, [], 0
        try:
            for part in self._template.generate(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self._variables,
            ):
                length += len(part)
                if length > most:
                    break
                written.append(part)
        except Exception as error:  # whatever a stranger's program can raise
            raise ValueError(
                f"the chat template of {self._where} refuses this: {_reason(error)}"
            ) from None
        if length > most:
            raise ValueError(
                f"the chat template of {self._where} writes more than {most:,} characters around"
                f" messages of {given:,}: mend it, or name another --template"
            )
        text = "".join(written)
        if _HALF.search(text):
            raise ValueError(
                f"what the chat template of {self._where} writes holds half of a surrogate pair,"
                " which is no character: mend it, or name another --template"
            )
        return text


# For private use: words that nobody says and no template knows.
_WORDS = "\U0010fffd"


def _with_other_words(messages: Sequence[Message], i: int) -> list[Message]:
    other = dataclasses.replace(messages[i], content=_WORDS)
    return [*messages[:i], other, *messages[i + 1 :]]


# Noncharacters of Unicode: they stand around what a {% generation %} block writes, until counted.
_START, _END = "\U0010fffe", "\U0010ffff"
_HALF = re.compile("[\ud800-\udfff]")
_NO_MARKS = {ord(_START): None, ord(_END): None}


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what is inside, the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own annotation)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_END}"


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """jinja's own would write < as \\u003c."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
