"""Questions in the forms they are published in, how they are worded, and what is refused."""

import dataclasses
import gzip
import json

import pytest

from train.evaluation import prompts, questions
from train.evaluation.items import Item
from train.evaluation.tasks import TASKS, arc, hellaswag, mmlu, openbookqa, plain, sciq

CHOICES = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
NESTED = {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "not", "label": "2"}]}
PUBLISHED = {
    "own": ({"question": "Why?", "choices": ["so", "not"], "answer": 1}, plain, 1),
    "own by letter": ({"question": "Why?", "choices": ["so", "not"], "answer": "B"}, plain, 1),
    "own by text": ({"question": "Why?", "choices": ["so", "not"], "answer": "so"}, plain, 0),
    "ARC": ({"id": "M_1", "question": "Why?", "choices": CHOICES, "answerKey": "C"}, arc, 2),
    "ARC, first release": ({"question": NESTED, "answerKey": "2"}, arc, 1),
    "OpenBookQA": ({"question_stem": "Why?", "choices": CHOICES, "answerKey": "B "}, openbookqa, 1),
    "OpenBookQA, first release": (
        {"question": NESTED, "fact1": "so it is", "answerKey": "1"},
        openbookqa,
        0,
    ),
    "HellaSwag": (
        {
            "activity_label": "Cooking",
            "ctx_a": "A pot boils [substeps] over.",
            "ctx_b": "it",
            "ctx": "A pot boils [substeps] over. it",
            "endings": ["spills. [title] The end", "sings."],
            "label": "1",
        },
        hellaswag,
        1,
    ),
}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", PUBLISHED)
def test_published_forms_are_known_by_their_fields(form, tmp_path):
    row, page, answer = PUBLISHED[form]
    items, found = questions.read([lines(tmp_path / "q.jsonl", row)])
    assert found is page
    assert items[0].answer == answer
    if page is hellaswag:
        assert items[0].question == "Cooking: A pot boils over. It"
        assert items[0].choices == ("spills.. The end", "sings.")
    else:
        assert items[0].question == "Why?"
        assert items[0].choices in (("so", "not"), ("red", "green", "blue"))
    assert items[0].name == ("M_1" if form == "ARC" else "q.jsonl:1")


def test_sciq_s_right_answer_stands_where_its_question_decides(tmp_path):
    rows = [
        {"question": f"Why {n}?", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
        | {"correct_answer": "right", "support": " Because."}
        for n in range(20)
    ]
    items, page = questions.read([lines(tmp_path / "q.jsonl", *rows)])
    assert page is sciq
    assert {item.choices[item.answer] for item in items} == {"right"}
    assert {item.answer for item in items} == {0, 1, 2, 3}
    assert questions.read([tmp_path / "q.jsonl"])[0] == items
    assert sciq.word(items[0]) == "Because.\nQuestion: Why 0?\nAnswer:"


def test_a_number_in_a_csv_file_is_no_two_choices(tmp_path):
    """The index of one choice and the text of another: of sums, some would be read either way."""
    path = tmp_path / "sums.csv"
    for row, index in (("a,b,c,2", 2), ("3,4,2,2", 2), ("7,8,9,8", 1)):
        path.write_text(f"question,A,B,C,answer\nWhich?,{row}\n")
        assert questions.read([path])[0][0].answer == index
    path.write_text("question,A,B,C,answer\n1 + 1?,1,2,3,2\n")
    with pytest.raises(ValueError, match=r"sums\.csv:2: the answer 2 may mean any of .*\[1, 2\]"):
        questions.read([path])


def test_openbookqa_s_first_release_looks_like_arc_s(tmp_path):
    """So that the name decides, which words it otherwise."""
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": NESTED, "answerKey": "1"}) + "\n")
    assert questions.load("openbookqa", path, shots=0).page is openbookqa
    assert questions.load("arc-easy", path, shots=0).page is arc
    assert questions.load(str(path)).page is arc


def test_csv_with_and_without_a_heading(tmp_path):
    test, dev = tmp_path / "data/test", tmp_path / "data/dev"
    for folder in (test, dev):
        folder.mkdir(parents=True)
    # A choice may be a letter, and a cell may hold line ends.
    (test / "world_religions_test.csv").write_text('"Who\nis it?",B,C,D,A,B\nWhere?,a,b,c,d,D\n')
    (dev / "world_religions_dev.csv").write_text("When?,now,then,ever,never,A\n")
    found = questions.load("mmlu", tmp_path / "data", shots=1)
    assert [item.question for item in found.items] == ["Who\nis it?", "Where?"]
    assert [item.answer for item in found.items] == [1, 3]
    assert [item.name for item in found.items] == [f"world_religions_test.csv:{n}" for n in (1, 3)]
    assert found.page is mmlu
    assert [e.question for e in found.examples["world_religions"]] == ["When?"]
    own = tmp_path / "own.csv"
    own.write_text("answer,question,A,B,C\n1,Why?,so,not,\nblue,Which?,red,green,blue\n")
    found = questions.load(str(own))
    assert [item.choices for item in found.items] == [("so", "not"), ("red", "green", "blue")]
    assert [item.answer for item in found.items] == [1, 2]
    own.write_text(f"answer,question,A,B\n1,{'Why? ' * 40_000},so,not\n", encoding="utf-8-sig")
    assert len(questions.load(str(own)).items[0].question) == 200_000
    own.write_bytes("answer,question,A,B\n1,Café?,so,not\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.csv is not text in UTF-8"):
        questions.load(str(own))


def test_arrays_gzip_and_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    row = PUBLISHED["ARC"][0]
    (tmp_path / "array.json").write_text(json.dumps([row, row]))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    hub = {"question": "Why?", "subject": "logic", "choices": ["B", "A"], "answer": 0}
    parquet.write_table(pyarrow.Table.from_pylist([hub]), tmp_path / "test-0.parquet")
    assert [len(questions.load(str(tmp_path / f)).items) for f in ("array.json",)] == [2]
    assert len(questions.load(str(tmp_path / "lines.jsonl.gz")).items) == 1
    (item,) = questions.load("mmlu", tmp_path / "test-0.parquet", shots=0).items
    assert (item.subject, item.choices, item.answer) == ("logic", ("B", "A"), 0)


GOOD = {"question": "Why?", "choices": ["so", "not"], "answer": 0}
BAD = [
    ({"question": " "}, "the question is empty"),
    ({"choices": ["so", "\ud800"]}, "the choice 1 holds half of a surrogate pair"),
    ({"question": None}, "the question must be text, not None"),
    ({"choices": ["so"]}, r"two choices or more: \('so',\)"),
    ({"choices": []}, "is none of the choices"),
    ({"choices": "so"}, "choices must be a list, not 'so'"),
    ({"choices": ["so", " "]}, r"choice \[1\] is empty"),
    ({"choices": ["so", 7]}, "choice 1 must be text, not 7"),
    ({"answer": 2}, "the answer 2 is none of the choices 0 to 1"),
    ({"answer": -1}, "the answer -1 is none"),
    ({"answer": True}, "must be a number or text, not True"),
    ({"answer": "C"}, r"'C' is none of the choices \['so', 'not'\]"),
    ({"choices": ["B", "A"], "answer": "A"}, r"'A' may mean any of the choices \[0, 1\]"),
    ({"choices": ["so", "so"], "answer": "so"}, "may mean any"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_question_is_named_by_file_and_line(changes, message, tmp_path):
    path = lines(tmp_path / "q.jsonl", GOOD, GOOD | changes)
    with pytest.raises(ValueError, match=rf"q\.jsonl:2: .*{message}"):
        questions.load(str(path))


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    for content, message in (
        ("", "no questions"),
        ('{"question": 1\n', r"q\.jsonl:1: invalid JSON"),
        ("[1]", r"q\.jsonl:1: a question is an object, not 1"),
        ('{"prompt": "?"}', r"q\.jsonl:1: a question has the fields .* not \['prompt'\]"),
        (json.dumps({"endings": ["a", "b"], "ctx": "c", "label": ""}), "without answers"),
        (json.dumps({"question": "?", "choices": CHOICES, "answerKey": "E"}), "none of the labels"),
        (json.dumps({"question": "?", "choices": 3, "answerKey": "E"}), "as many texts as labels"),
        (
            json.dumps(
                {"question": "?", "choices": CHOICES | {"label": ["B"] * 3}, "answerKey": "B"}
            ),
            "the answer 'B' may be any of the labels",
        ),
        (json.dumps(GOOD) + "\n" + json.dumps(PUBLISHED["HellaSwag"][0]), ":2: .* another task"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            questions.load(str(path))
    (tmp_path / "q.csv").write_text("question,A,B,answer\nWhy?,so,not\n")
    with pytest.raises(ValueError, match=r"q\.csv:2: 3 cells, and the heading has 4"):
        questions.load(str(tmp_path / "q.csv"))
    (tmp_path / "q.csv").write_text("Why?,so,A\n")
    with pytest.raises(ValueError, match=r"q\.csv:1: 3 cells: a question, its choices"):
        questions.load(str(tmp_path / "q.csv"))


def test_where_data_are_looked_for(tmp_path, monkeypatch):
    row = PUBLISHED["ARC"][0]
    (tmp_path / "arc").mkdir()
    for name in ("ARC-Easy-test", "ARC-Easy-validation", "ARC-Challenge-test"):
        lines(tmp_path / "arc" / f"{name}.jsonl", row | {"id": name})
    for name, split, expected in (
        ("arc-easy", None, "ARC-Easy-test"),
        ("arc-easy", "validation", "ARC-Easy-validation"),
        ("arc-challenge", None, "ARC-Challenge-test"),
    ):
        for folder in (tmp_path, tmp_path / "arc"):
            found = questions.load(name, folder, split=split)
            assert [item.name for item in found.items] == [expected]
    with pytest.raises(ValueError, match="no file of arc-challenge whose name says dev: ARC-"):
        questions.load("arc-challenge", tmp_path, split="dev")
    with pytest.raises(ValueError, match="--task-data names a file or a folder"):
        questions.load("sciq", tmp_path / "none")
    with pytest.raises(ValueError, match=r"--task must be one of mmlu, .* or a file, not mmmlu"):
        questions.load("mmmlu")
    with pytest.raises(ValueError, match="--shots 2 needs solved examples: --shots-from"):
        questions.load(str(tmp_path / "arc/ARC-Easy-test.jsonl"), shots=2)


def test_the_hub_is_asked_for_a_split_and_its_absence_explained(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import huggingface_hub
    import pyarrow

    def download(repository, *, repo_type, allow_patterns):
        assert (repository, repo_type) == ("allenai/ai2_arc", "dataset")
        assert allow_patterns == ["ARC-Easy/test*.parquet"]
        (tmp_path / "ARC-Easy").mkdir()
        table = pyarrow.Table.from_pylist([PUBLISHED["ARC"][0]])
        parquet.write_table(table, tmp_path / "ARC-Easy/test-00000-of-00001.parquet")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = questions.load("arc-easy")
    assert [item.name for item in found.items] == ["M_1"]
    assert found.source == "allenai/ai2_arc ARC-Easy (test)"

    def unreachable(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"data set allenai/sciq, files data/test\*\.parquet"):
        questions.load("sciq")
    with pytest.raises(ValueError, match=r"had: no network\. Without a network --task-data"):
        questions.load("sciq")


def test_a_larger_sample_holds_a_smaller_one():
    many = questions.Questions("q", "q", [Item("?", ("a", "b"), 0)] * 50, plain)
    few, more = many.sample(5, seed=1), many.sample(20, seed=1)
    assert len(few) == 5
    assert set(few) < set(more)
    assert few == sorted(few) != [0, 1, 2, 3, 4]
    assert few == many.sample(5, seed=1) != many.sample(5, seed=2)
    assert many.sample(None, seed=1) == many.sample(99, seed=1) == list(range(50))


RELIGION = Item(" Who? ", ("a", "b", "c", "d"), 2, subject="world_religions")
EXAMPLE = Item("When?", ("now", "then", "ever", "never"), 0, subject="world_religions")


def test_the_prompt_of_the_code_published_with_mmlu():
    found = prompts.word(RELIGION, [EXAMPLE], mmlu, "hendrycks", "letters")
    assert found.context == (
        "The following are multiple choice questions (with answers) about  world religions.\n\n"
        "When?\nA. now\nB. then\nC. ever\nD. never\nAnswer: A\n\n"
        " Who? \nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    assert found.continuations == (" A", " B", " C", " D")
    unnamed = dataclasses.replace(RELIGION, subject="", context="Long ago.")
    assert prompts.word(unnamed, [], plain, "hendrycks", "text") == (
        "The following are multiple choice questions (with answers).\n\n"
        "Long ago.\n Who? \nA. a\nB. b\nC. c\nD. d\nAnswer:",
        (" a", " b", " c", " d"),
    )


def test_the_prompts_of_lm_evaluation_harness():
    found = prompts.word(RELIGION, [EXAMPLE], mmlu, "harness", "letters")
    assert found.context == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "When?\nA. now\nB. then\nC. ever\nD. never\nAnswer: A\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    item = Item("Why?", ("so", "not"), 1)
    for page, context in (
        (arc, "Question: Why?\nAnswer:"),
        (openbookqa, "Why?"),
        (hellaswag, "Why?"),
        (sciq, "\nQuestion: Why?\nAnswer:"),
        (plain, "Question: Why?\nAnswer:"),
    ):
        assert prompts.word(item, [], page, "harness", "text") == (context, (" so", " not"))
        assert prompts.answer_by(page, "harness", None) == "text"
        assert prompts.answer_by(page, "hendrycks", None) == "letters"
        with pytest.raises(ValueError, match="--prompt harness shows no letters here"):
            prompts.answer_by(page, "harness", "letters")
    shown = prompts.word(item, [item], arc, "harness", "text").context
    assert shown == "Question: Why?\nAnswer: not\n\nQuestion: Why?\nAnswer:"
    assert prompts.answer_by(mmlu, "harness", None) == "letters"


def test_a_task_takes_nothing_from_the_folders_of_others(tmp_path):
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "ARC-Easy-test.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds no file of sciq whose name says test: nothing"):
        questions.find("sciq", TASKS["sciq"], "test", tmp_path)
    (found,) = questions.find("arc-easy", TASKS["arc-easy"], "test", tmp_path)
    assert found.name == "ARC-Easy-test.jsonl"
