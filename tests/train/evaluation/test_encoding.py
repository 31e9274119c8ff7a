"""Questions as tokens: see test_questions.py and test_evaluate.py; here, what is encoded twice."""

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
