"""Questions as tokens: see test_questions.py and test_evaluate.py; here, what is encoded twice."""

import pytest
import tokenizers

from train.evaluation import encoding
from train.evaluation.prompts import Worded
from train.text.pretrained import PretrainedTokenizer


def tokenizer(vocabulary: dict[str, int]) -> PretrainedTokenizer:
    model = tokenizers.models.WordLevel(vocabulary, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PretrainedTokenizer(made, {"eos_token": "?"}, stops=(), template=None, where="here")


def test_what_two_models_ask_is_encoded_once_where_their_tokenizers_agree(monkeypatch):
    encoded = []
    encode = PretrainedTokenizer.encode_texts
    monkeypatch.setattr(
        PretrainedTokenizer, "encode_texts", lambda self, x: (encoded.append(x), encode(self, x))[1]
    )
    texts = [Worded("a b", (" a", " c")), Worded("c ", ("b",))]
    one = encoding.trees(tokenizer({"?": 0, "a": 1, "b": 2, "c": 3}), texts)
    assert one[0] == ([1, 2], [[1], [3]])
    assert one[1] == ([3], [[2]])
    assert encoding.trees(tokenizer({"?": 0, "a": 1, "b": 2, "c": 3}), iter(texts)) == one
    assert len(encoded) == 1
    assert encoding.trees(tokenizer({"?": 0, "a": 3, "b": 2, "c": 1}), texts)[0].context == [3, 2]
    assert len(encoded) == 2


def test_a_question_that_holds_a_token_without_a_row_is_refused_whoever_asked_it_before():
    vocabulary = {"?": 0, "a": 1, "b": 2}
    with_image, small = tokenizer(vocabulary), tokenizer(vocabulary)
    for one in (with_image, small):
        one._tokenizer.add_special_tokens(["<image>"])
    texts = [Worded("a", (" b",)), Worded("b " * 90 + "a <image>", (" b",))]
    assert encoding.trees(with_image.of_head(4), texts)[1].context[-1] == 3
    refused = r"the text holds the token <image> \(id 3\), for .* of 3 rows.*: … '.*a <image>' …"
    with pytest.raises(ValueError, match=refused):
        encoding.trees(small.of_head(3), texts)
