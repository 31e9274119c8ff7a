import io
import json
import logging

import pytest
import rich.console

from train.data import dataset, summary


def records(name: str, count: int) -> str:
    turns = [("user", f"What is {name}?"), ("assistant", "It is [red]."), ("user", "Sure?")]
    return "".join(
        json.dumps(
            {
                "messages": [
                    *({"role": role, "content": said} for role, said in turns),
                    {"role": "assistant", "content": f"Yes, {name} number {i}."},
                ]
            }
        )
        + "\n"
        for i in range(count)
    )


def build(tmp_path, *data, **options):
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text(records(name, count))
    small = {"held_out": 0, "max_length": 64, "batch_size": 2, "vocab_size": 400, "seed": 0}
    paths = [f"{tmp_path}/{name}" for name in data]
    return dataset.build(data=paths, cache_dir=tmp_path / "cache", **small | options)


def test_the_example_shows_what_has_loss(tmp_path):
    shown = io.StringIO()
    summary.show_example(build(tmp_path, "a.jsonl"), rich.console.Console(file=shown))
    assert shown.getvalue().splitlines()[1:] == [
        "<|bos|><|user|>What is a?<|end|><|assistant|>⟦It is [red].<|end|>⟧"
        "<|user|>Sure?<|end|><|assistant|>⟦Yes, a number 0.<|end|>⟧"
    ]


def test_a_terminal_shows_it_in_colour(tmp_path):
    terminal = io.StringIO()
    console = rich.console.Console(file=terminal, force_terminal=True, color_system="standard")
    summary.show_example(build(tmp_path, "a.jsonl"), console)
    assert "\x1b[32m⟦It is [red].<|end|>⟧\x1b[0m" in terminal.getvalue()


def test_long_stretches_lose_their_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MOST_CHARACTERS", 10)
    data = build(tmp_path, "a.jsonl")
    assert "⟦It is … end|>⟧" in summary.painted(data.tokenizer, data.example).plain


@pytest.mark.parametrize("weights", ["", ":1"])
def test_several_files_are_counted_apart(tmp_path, caplog, weights):
    data = build(tmp_path, f"a.jsonl{weights}", f"b.jsonl{weights}")
    with caplog.at_level(logging.INFO):
        summary.log(data)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("data: 40 records: 40 train, 0 held out; ")
    assert lines[0].endswith(" rows, " + f"{data.train.rows.padding:.1%} padding")
    assert lines[1].startswith("  a.jsonl: 30 records: 30 train")
    assert lines[2].startswith("  b.jsonl: 10 records: 10 train")
    assert ("50.0% of the rows trained on, has" in lines[2]) == bool(weights)


def test_one_file_is_counted_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        summary.log(build(tmp_path, "a.jsonl"))
    assert len([r for r in caplog.records if r.name == summary.__name__]) == 1
