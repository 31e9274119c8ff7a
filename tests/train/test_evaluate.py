"""`python -m train.evaluate` on a tiny model: from a file of questions to result and pictures."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from oracles.inputs import weights
from tokenizers import AddedToken, models, pre_tokenizers, processors

from train import evaluate
from train.evaluation import answers, asking, encoding, measures, questions, results, table
from train.evaluation.items import Item
from train.evaluation.likelihood import Tree
from train.evaluation.prompts import Worded
from train.evaluation.tasks import mmlu, plain
from train.models import families
from train.models.weights import safetensors
from train.models.weights.load import shapes
from train.text.chat import BUILT_IN
from train.text.pretrained import PretrainedTokenizer

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 270,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 320,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SPECIAL = ["<s>", "</s>"]
MERGED = [("Ġ", letter) for letter in "ABCD"]
"""Each letter with its blank is one token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    config = families.read(CONFIG, "it")
    places = families.places(config, shapes(config), "huggingface")
    tensors = weights({name: p.shape for name, p in places.items()}, zero_centred=False)
    safetensors.save(tensors.items(), path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *SPECIAL, *map("".join, MERGED)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, MERGED)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": BUILT_IN["alpaca"]}
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve questions of two subjects, and two solved examples of each."""
    path = tmp_path_factory.mktemp("mmlu")
    for split, count in (("test", 6), ("dev", 2), ("val", 3)):
        (path / split).mkdir()
        for subject in ("art", "war"):
            asked = [f"{split} {subject} {n}?,one,two,three,four" for n in range(count)]
            rows = [f"{question},{'ABCD'[n % 4]}" for n, question in enumerate(asked)]
            (path / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n")
    return path


def call(model: Path, out: Path, *arguments: str) -> int:
    always = ["--model", str(model), "--out", str(out), "--resamples", "0"]
    return evaluate.main([*always, "--batch-tokens", "256", *map(str, arguments)])


def one_by_one(model: Path, item: Item, examples: list[Item]) -> np.ndarray:
    """log p of each letter, with one row for the whole prompt and every logit."""
    from train.evaluation import prompts
    from train.run import model as run_model

    loaded = run_model.read(str(model))
    text = prompts.word(item, examples, mmlu, "hendrycks", "letters").context
    tokens = np.array(loaded.tokenizer.encode_text(text), np.int32)[None]
    hidden = loaded.model(
        tokens, np.ones_like(tokens), np.arange(tokens.size, dtype=np.int32)[None]
    )
    logits = np.asarray(hidden[0, -1], np.float64) @ np.asarray(loaded.model.head, np.float64).T
    log_p = logits - np.logaddexp.reduce(logits)
    return log_p[[vocabulary_id(loaded.tokenizer, letter) for letter in "ABCD"]]


def vocabulary_id(tokenizer: PretrainedTokenizer, letter: str) -> int:
    (token,) = tokenizer.encode_text(f" {letter}", start=False)
    return token


@pytest.fixture(scope="module")
def evaluated(model, data, tmp_path_factory):
    """Makes it once, but in a test: `quickly_compiled` begins after what is of the module."""

    @functools.cache
    def make() -> Path:
        out = tmp_path_factory.mktemp("done") / "out"
        flags = ("--task", "mmlu", "--task-data", data, "--shots", 2)
        assert call(model, out, *flags, "--temperature-from", "validation") == 0
        return out

    return make


@pytest.fixture
def done(quickly_compiled, evaluated) -> Path:
    return evaluated()


@pytest.mark.slow
def test_letters_after_shots_are_those_of_whole_prompts(done, model, data):
    result = results.read(done)
    task = result.tasks["mmlu"]
    assert (task.questions, task.available, task.left_out, task.shots_dropped) == (12, 12, 0, 0)
    assert (task.prompt, task.answer) == ("hendrycks", "letters")
    assert (task.shots, task.letter_tokens) == (2, 1)
    assert task.chance == 0.25
    _, lines, _ = answers.read(done / task.items)
    asked = questions.load("mmlu", data, shots=2)
    for i in (0, 11):
        item = asked.items[i]
        expected = one_by_one(model, item, list(asked.examples[item.subject]))
        np.testing.assert_allclose(lines[i]["log_prob"], expected, atol=1e-4)
    log_prob = np.array([lines[i]["log_prob"] for i in range(12)])
    among = log_prob - np.logaddexp.reduce(log_prob, axis=1, keepdims=True)
    label = [item.answer for item in asked.items]
    for name, log_probs in (("choices", among), ("vocabulary", log_prob)):
        found = task.scorings[name].measures
        assert found["nll"].value == pytest.approx(-log_probs[range(12), label].mean(), abs=1e-5)
        accuracy = np.mean(log_prob.argmax(1) == label)
        assert found["accuracy"].value == pytest.approx(accuracy, abs=1e-6)
    outside = 1 - np.exp(log_prob).sum(1).mean()
    assert task.scorings["vocabulary"].measures["outside"].value == pytest.approx(outside, abs=1e-5)
    assert [s.name for s in task.scorings["choices"].subjects] == ["art", "war"]
    for picture in ("reliability.png", "risk-coverage.png"):
        assert (done / picture).read_bytes()[:4] == b"\x89PNG"
    assert "--shots 2" in result.command
    assert result.step is None


@pytest.mark.slow
def test_a_temperature_is_fitted_on_other_questions(done):
    fitted = results.read(done).tasks["mmlu"].scorings["choices"].temperature
    assert fitted.n == 6
    assert fitted.fitted_on.endswith("(validation)")
    plain = results.read(done).tasks["mmlu"].scorings["choices"].measures
    assert fitted.measures["accuracy"].value == plain["accuracy"].value
    task = results.read(done).tasks["mmlu"]
    scored = task.scorings["choices"]
    for value, said in ((1.5, False), (1000.0, True), (0.001, True)):
        at = dataclasses.replace(fitted, value=value)
        task.scorings["choices"] = dataclasses.replace(scored, temperature=at)
        assert ("at the end of its range" in table.caption(task)) == said
    assert fitted.measures["auroc"].value != fitted.measures["nll"].value != plain["nll"].value


@pytest.mark.slow
def test_what_was_interrupted_goes_on_and_what_differs_is_refused(
    done, model, data, tmp_path, monkeypatch, capsys
):
    """To the same result, to the bit, of answers kept and new ones."""
    out = tmp_path / "out"
    flags = ("--task", "mmlu", "--task-data", data, "--shots", 2)
    shutil.copytree(done, out)
    path = out / results.read(out).tasks["mmlu"].items
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:6]) + whole[6][:20])
    asked = []
    original = asking.log_likelihoods

    def counted(*arguments, **options):
        for batch in original(*arguments, **options):
            asked.extend(batch)
            yield batch

    monkeypatch.setattr(asking, "log_likelihoods", counted)
    assert call(model, out, *flags) == 0
    assert 7 <= len(asked) < 12
    assert sorted(path.read_text().splitlines()) == sorted("".join(whole).splitlines())
    scorings = results.read(out).tasks["mmlu"].scorings
    before = results.read(done).tasks["mmlu"].scorings
    assert scorings["vocabulary"] == before["vocabulary"]
    assert scorings["choices"].measures == before["choices"].measures
    asked.clear()
    assert call(model, out, *flags, "--limit", 5) == 0
    assert not asked
    assert results.read(out).tasks["mmlu"].questions == 5
    capsys.readouterr()
    assert call(model, out, *flags[:-1], 1) == 2
    assert "answers that another evaluation gave (data_sha256" in capsys.readouterr().err
    assert call(model, out, *flags[:-1], 1, "--overwrite") == 0


@pytest.mark.slow
def test_two_models_are_compared_on_the_same_questions(
    done, model, data, tmp_path, capsys, monkeypatch
):
    # Without the errors, whose differences take seconds to compile.
    monkeypatch.setattr(measures, "GROUPS", measures.GROUPS[:1])
    flags = ("--task", "mmlu", "--task-data", data, "--shots", 2)
    out = tmp_path / "out"
    shutil.copytree(done, out)
    assert call(model, out, *flags, "--against", done) == 0
    against = results.read(out).tasks["mmlu"].against
    assert against.n == 12
    assert against.scorings["choices"]["nll"].value == 0
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    assert call(model, out, "--task", path) == 0  # which keeps what was found before
    assert list(results.read(out).tasks) == ["mmlu", str(path)]
    assert results.read(out).tasks["mmlu"].against == against
    assert call(model, tmp_path / "less", *flags, "--limit", 3, "--against", done) == 2
    assert "with other questions or words (questions 12, here 3)" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=str)
def test_a_file_of_the_user_s_is_not_replaced(model, tmp_path, capsys, flags):
    path, theirs = tmp_path / "own.jsonl", tmp_path / "out" / results.RESULT
    path.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    theirs.parent.mkdir()
    theirs.write_text('{"accuracy": 1}')
    assert call(model, theirs.parent, "--task", path, *flags) == 2
    assert f"{theirs} is no result of train.evaluate: it has no 'format': name another --out" in (
        capsys.readouterr().err
    )
    assert theirs.read_text() == '{"accuracy": 1}'
    assert list(theirs.parent.iterdir()) == [theirs]


@pytest.mark.slow
def test_tasks_whose_answers_are_text_and_responses(model, tmp_path, capsys):
    rows = [
        {"question": f"{n}?", "choices": ["a", "bb b", "c"][: 2 + n % 2], "answer": n % 2}
        for n in range(5)
    ]
    path, records = tmp_path / "own.jsonl", tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"prompt": f"{n}?", "completion": "y" * n} for n in range(1, 9)]
    records.write_text("".join(json.dumps(record) + "\n" for record in said))
    out = tmp_path / "out"
    assert call(model, out, "--task", path, "--tokens", records, "--max-length", 256) == 0
    printed = capsys.readouterr().out
    assert "per character" in printed
    assert "next token" in printed
    result = results.read(out)
    task = result.tasks[str(path)]
    assert task.chance == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 2]))
    _, lines, _ = answers.read(out / task.items)
    assert lines[1]["characters"] == [1, 4, 1]
    assert lines[1]["tokens"] == [2, 5, 2]  # bytes, and the blank before them
    found = {name: scored.measures["nll"].value for name, scored in task.scorings.items()}
    for name, unit in (("sum", None), ("per_character", "characters"), ("per_token", "tokens")):
        nll = []
        for n, line in lines.items():
            score = np.array(line["log_prob"]) / (np.array(line[unit]) if unit else 1)
            nll.append(np.logaddexp.reduce(score) - score[rows[n]["answer"]])
        assert found[name] == pytest.approx(np.mean(nll), abs=1e-5)
    assert result.tokens.n == sum(range(1, 9)) + 8  # each ends with one token more
    assert call(model, out, "--task", path, "--max-length", 256) == 0  # which keeps the tokens
    assert results.read(out).tokens == result.tokens
    assert results.read(out).tokens_data == str(records)
    assert set(measures.NAMES) - set(result.tokens.measures) == {
        "sce", "ace", "brier_reliability", "brier_resolution", "brier_uncertainty",
        "brier_within_bins", "outside",
    }  # fmt: skip


def test_solved_examples_go_where_they_have_no_room(model):
    tokenizer = PretrainedTokenizer.from_folder(model)
    example = Item("x" * 20, ("a", "b"), 0)
    items = {i: Item("y" * n, ("a", "b"), 0) for i, n in enumerate((10, 30, 200))}
    found = encoding.encode(
        tokenizer, items, {"": [example] * 2}, mmlu, "harness", "letters", shots=2, max_length=115
    )
    assert {i: encoded.shots for i, encoded in found.items()} == {0: 2, 1: 1}
    for encoded in found.values():
        assert len(encoded.tree.context) <= 115
    with pytest.raises(ValueError, match="--shots 3: there are only 2 solved examples"):
        encoding.encode(
            tokenizer, items, {"": [example] * 2}, mmlu, "harness", "letters", shots=3, max_length=9
        )


def test_the_last_of_the_solved_examples_go_first(model):
    """As in the code published with MMLU, so that its prompts are ours."""
    tokenizer = PretrainedTokenizer.from_folder(model)
    examples = [Item(question, ("a", "b"), 0) for question in ("first", "second", "third")]
    found = encoding.encode(
        tokenizer,
        {0: Item("y" * 30, ("a", "b"), 0)},
        {"": examples},
        *(mmlu, "harness", "letters"),
        shots=3,
        max_length=115,
    )
    said = tokenizer.decode(found[0].tree.context)
    assert said.index("first") < said.index("second") < said.index("yyy")
    assert "third" not in said


def test_a_question_that_is_one_of_the_solved_examples_has_one_fewer(model):
    """MMLU has five a subject, and one of them stands in its validation split, too."""
    tokenizer = PretrainedTokenizer.from_folder(model)
    examples = [Item(question, ("a", "b"), 0) for question in ("first", "second")]
    items = {0: Item("other", ("a", "b"), 0), 1: examples[0]}
    found = encoding.encode(
        tokenizer, items, {"": examples}, mmlu, "harness", "letters", shots=2, max_length=None
    )
    assert {i: encoded.shots for i, encoded in found.items()} == {0: 2, 1: 1}
    assert tokenizer.decode(found[1].tree.context).count("first") == 1


def test_texts_are_cut_as_lm_evaluation_harness_cuts_them(model):
    """Blanks go to the continuation, and the two are encoded together."""
    tokenizer = PretrainedTokenizer.from_folder(model)
    start, question, a, b = (tokenizer.encode_text(x, start=False) for x in ("<s>", "?", " A", "b"))
    (tree,) = encoding.trees(tokenizer, [Worded("? ", ("A", "b"))])
    blank = tokenizer.encode_text(" ", start=False)
    assert tree == Tree(start + question, [a, blank + b])
    with pytest.raises(ValueError, match="'' adds no token to"):
        encoding.trees(tokenizer, [Worded("?", ("",))])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "mmmlu"), "--task must be one of"),
        (("--task", "mmlu", "--shots", "9"), "there are only 2 solved examples"),
        (("--task", "mmlu", "--shots", "0", "--max-length", "999"), "the model's context, 320"),
        (("--task", "mmlu", "--shots", "0", "--max-length", "9"), "no question of mmlu fits in"),
        (("--task", "mmlu", "--temperature-from", "test"), "what is evaluated on"),
        (("--task", "mmlu", "--temperature-from", "x"), "or a file, not x"),
        (("--task", "mmlu", "--against", "nowhere"), "there is no result nowhere"),
    ],
)
def test_mistakes_are_one_line(flags, message, model, data, tmp_path, capsys):
    assert call(model, tmp_path / "out", *flags, "--task-data", data) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0


def test_no_temperature_is_fitted_on_what_it_is_judged_by(tmp_path):
    """27 of the 1,531 questions of MMLU's validation split stand in its test split, too."""
    asked, fitting = tmp_path / "asked.jsonl", tmp_path / "fitting.jsonl"
    rows = [f'{{"question": "{q}?", "choices": ["a", "b"], "answer": 0}}\n' for q in "xyz"]
    asked.write_text("".join(rows[:2]))
    fitting.write_text("".join(rows[1:]))
    options = evaluate.EvaluateOptions(model="m", task=(str(asked),), temperature_from=str(fitting))
    found = evaluate._fitted_on(
        questions.load(str(asked)), options, {"shots": None, "shots_from": None}
    )
    assert [item.question for item in found.items] == ["z?"]


def test_the_same_questions_and_others_are_told_apart_before_the_model_is_read(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "?", "choices": ["a", "b"], "answer": 0}\n')
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    about = {"model": "m", "weights": "0", "command": "", "seed": 0, "versions": {}}
    results.write(tmp_path / results.RESULT, results.Result(**about, device="cpu", tasks={}))
    for flags, message in (
        (("--temperature-from", copy), f"--temperature-from {copy} is what is evaluated on"),
        (("--against", tmp_path), f"--against {tmp_path} has no {path}"),
        (("--split", "dev"), "--split dev is for named tasks: --task names a file"),
        (("--shots-from", copy), "of which none is asked for: --shots K"),
    ):
        assert call(tmp_path / "none", tmp_path / "out", "--task", path, *flags) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ()}, "nothing to evaluate: give --task or --tokens"),
        ({"limit": 0}, "--limit must be at least 1, not 0"),
        ({"task": ("mmlu", "mmlu")}, "--task names one twice"),
        ({"shots": -1}, "--shots must be at least 0"),
        ({"task": (), "tokens": ("r",), "shots": 2}, "--shots 2 is for questions: there is no"),
    ],
)
def test_impossible_flags(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateOptions(**{"model": "m", "task": ("mmlu",)} | changes)


def test_a_result_of_several_commands_has_them_all(tmp_path):
    def found(command: str, *tasks: str) -> results.Result:
        one = results.TaskResult(
            **{"task": "t", "data": "d", "data_sha256": "0", "questions": 1, "available": 1},
            **{"left_out": 0, "prompt": "harness", "answer": "text", "shots": 0, "chance": 0.5},
            **{"reported": "sum", "scorings": {}, "items": "i"},
        )
        settings = {"dtype": "float32", "limit": None, "seed": 0}
        whose = {"model": "m", "weights": "0", "seed": 0, "versions": {}, "device": "cpu"}
        return results.Result(
            command=command, settings=settings, tasks=dict.fromkeys(tasks, one), **whose
        )

    def kept(command: str, *tasks: str) -> results.Result:
        merged = evaluate._with_earlier(tmp_path, found(command, *tasks))
        results.write(tmp_path / results.RESULT, merged)
        return merged

    assert kept("first", "a", "b").command == "first"
    second = kept("second", "c")
    assert (second.command, [*second.tasks]) == ("first && second", ["a", "b", "c"])
    assert kept("second", "c").command == "first && second"
    assert kept("all", "a", "b", "c").command == "all"


def test_a_temperature_divides_what_it_was_not_fitted_on(monkeypatch):
    """T has the least NLL of the other questions, by a grid, and then divides the scores of these,
    whose own best one is another."""
    monkeypatch.setattr(measures, "GROUPS", measures.GROUPS[:1])
    rng = np.random.default_rng(0)

    def asked(n: int, sharpness: float) -> answers.Answers:
        z = rng.normal(size=(n, 3))
        label = (rng.random((n, 1)) > np.cumsum(softmax(z), 1)[:, :2]).sum(1)
        ones = np.ones((n, 3), int)
        return answers.Answers(np.arange(n), label, sharpness * z, 2 * ones, 5 * ones, [""] * n)

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    def nll(z: np.ndarray, label: np.ndarray) -> float:
        return -float(np.log(softmax(z)[np.arange(len(z)), label]).mean())

    these, others = asked(200, 8.0), asked(150, 3.0)
    task = results.TaskResult(
        **{"task": "t", "data": "d", "data_sha256": "0", "questions": 200, "available": 200},
        **{"left_out": 0, "prompt": "harness", "answer": "text", "shots": 0, "chance": 1 / 3},
        **{"reported": "sum", "items": "i"},
        scorings=asking.scored(these, "text", resamples=0, seed=0),
    )
    task = asking.with_temperature(task, these, others, "it", resamples=0, seed=0)
    for name, part in (("sum", 1.0), ("per_token", 0.5), ("per_character", 0.2)):
        fitted = task.scorings[name].temperature
        assert fitted is not None
        assert fitted.n == 150
        grid = np.geomspace(0.05, 20, 2000)
        best = grid[np.argmin([nll(part * others.log_prob / t, others.label) for t in grid])]
        assert fitted.value == pytest.approx(best, rel=5e-3)
        expected = nll(part * these.log_prob / fitted.value, these.label)
        assert fitted.measures["nll"].value == pytest.approx(expected, rel=1e-5)


def test_answers_depend_on_which_choice_is_right():
    """Else a corrected key would be judged by the answers' old one."""
    how = asking.Asking(prompt="harness", answer="text", shots=0, max_length=None, batch_tokens=1)
    first, second = (
        questions.Questions("q", "q", [Item("Why?", ("so", "not"), right)], plain)
        for right in (0, 1)
    )
    assert asking._digest(first, how, {0: 0}) != asking._digest(second, how, {0: 0})


def test_weights_are_told_apart():
    from flax import nnx

    state = nnx.State({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32)})
    swapped = nnx.State({"a": np.arange(6, dtype=np.float32)[::-1].copy(), "b": state["b"]})
    assert asking.checksum(state) == asking.checksum(state) != asking.checksum(swapped)


@pytest.mark.parametrize(
    ("prompt", "context", "expected"),
    [("harness", None, 2048), ("harness", 8192, 8192), ("hendrycks", 8192, 2048)],
)
def test_prompts_have_a_bound_whatever_the_model_says_of_its_context(prompt, context, expected):
    how = asking.Asking(prompt=prompt, answer="text", shots=0, max_length=None, batch_tokens=1)
    assert evaluate._max_length(how, context) == expected
    own = dataclasses.replace(how, max_length=9)
    assert evaluate._max_length(own, context) == 9
