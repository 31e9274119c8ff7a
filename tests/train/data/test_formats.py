import pytest

from train.data.formats import parse
from train.data.records import Message

SYSTEM = Message("system", "Be brief.")
QUESTION, ANSWER = Message("user", "1 + 1?"), Message("assistant", "2")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]
USER, ASSISTANT = TURNS[1:]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3", "subsets": ["extra"]},
            [Message("user", "Add.\n\n1, 2"), Message("assistant", "3")],
        ),
        ({"instruction": "1 + 1?", "input": "", "output": "2"}, [QUESTION, ANSWER]),
        ({"instruction": "1 + 1?", "output": "2", "text": "1 + 1? 2"}, [QUESTION, ANSWER]),
        ({"prompt": "1 + 1?", "completion": "2"}, [QUESTION, ANSWER]),
        ({"messages": TURNS}, [SYSTEM, QUESTION, ANSWER]),
        ({"messages": None, "prompt": "1 + 1?", "completion": "2"}, [QUESTION, ANSWER]),
        ({"instruction": "1 + 1?", "output": "2", "prompt": "another"}, [QUESTION, ANSWER]),
        ({"messages": TURNS, "tools": [], "functions": None}, [SYSTEM, QUESTION, ANSWER]),
        ({"messages": [USER, ASSISTANT | {"tool_calls": None}]}, [QUESTION, ANSWER]),
        (
            {"messages": [{"role": "user", "content": parts("1 ", "+ 1?")}, ASSISTANT]},
            [QUESTION, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "1 + 1?"},
                    {"from": "gpt", "value": "2"},
                ]
            },
            [SYSTEM, QUESTION, ANSWER],
        ),
        ({"conversations": TURNS}, [SYSTEM, QUESTION, ANSWER]),
        ({"prompt": TURNS[:2], "completion": TURNS[2:]}, [SYSTEM, QUESTION, ANSWER]),
        ({"prompt": TURNS[:2], "completion": "2"}, [SYSTEM, QUESTION, ANSWER]),
        ({"text": "Some text.\n"}, [Message("text", "Some text.\n")]),
    ],
)
def test_every_format_becomes_a_conversation(fields, messages):
    assert parse(fields) == tuple(messages)


def test_a_turn_of_weight_0_is_not_learned():
    turns = [USER, ASSISTANT | {"weight": 0}, USER | {"weight": 0}, ASSISTANT | {"weight": 1}]
    assert [m.has_loss for m in parse({"messages": turns})] == [False, False, False, True]


def test_what_the_assistant_says_in_a_prompt_is_not_learned():
    prompt = [USER, ASSISTANT, USER]
    messages = parse({"prompt": prompt, "completion": [ASSISTANT]})
    assert [m.has_loss for m in messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (["prompt"], "expected a JSON object, got an array"),
        (3, "expected a JSON object, got a number"),
        ({"question": "a", "answer": "b"}, "the fields are ['answer', 'question']"),
        ({"prompt": "a"}, "missing field 'completion'"),
        ({"instruction": "a", "input": "b"}, "missing field 'output'"),
        (
            {"instruction": "a", "input": ["b"], "output": "c"},
            "'input' must be a string, got an array",
        ),
        ({"prompt": "a", "completion": None}, "'completion' must be a string, got null"),
        ({"prompt": 1.5, "completion": "b"}, "'prompt' must be a string, got a number"),
        ({"prompt": True, "completion": "b"}, "'prompt' must be a string, got a boolean"),
        ({"text": b"bytes"}, "'text' must be a string, got a bytes"),
        ({"prompt": "a", "completion": "\ud800"}, "'completion' holds half of a surrogate pair"),
        ({"prompt": "a", "completion": [USER]}, "no message of 'completion' has the role"),
        ({"messages": {"role": "user"}}, "'messages' must be an array, got an object"),
        ({"messages": ["hi"]}, "'messages[0]' must be an object, got a string"),
        ({"messages": []}, "no message of the record has the role 'assistant'"),
        ({"messages": TURNS[:2]}, "no message of the record has the role 'assistant'"),
        ({"messages": [{"content": "a"}]}, "missing field 'messages[0].role'"),
        ({"messages": [{"role": "user"}]}, "missing field 'messages[0].content'"),
        ({"messages": [{"role": "text", "content": "a"}]}, "unknown role 'text' in 'messages[0]'"),
        ({"conversations": [{"from": "gpt"}]}, "missing field 'conversations[0].value'"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "'messages[1].weight' must be 0 or 1"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "every assistant message has weight 0"),
        (
            {"messages": [{"role": "user", "content": [*parts("a"), {"type": "image_url"}]}]},
            "'messages[0].content[1]' is of the type 'image_url': only text can be learned",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "'messages[0].content[0]' must be an"),
        (
            {"messages": [*TURNS, {"role": "tool", "content": "a"}]},
            "tool calls are not supported: 'messages[3]' has the role 'tool'",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}]},
            "tool calls are not supported: 'conversations[0]' has the role 'function_call'",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "tool calls are not supported: 'messages[1].tool_calls' is there",
        ),
        ({"messages": TURNS, "tools": [{}]}, "tool calls are not supported: 'tools' is there"),
    ],
)
def test_a_bad_record_is_refused_by_field(bad, what):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is asserted below)
        parse(bad)
    assert what in str(error.value)
