"""Shapes to measure at, named after the models they come from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """N tokens, D hidden size and V vocabulary of one call of the loss."""

    name: str
    n: int
    d: int
    v: int

    def __post_init__(self) -> None:
        for size in ("n", "d", "v"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size.upper()}={getattr(self, size)} of case {self.name!r} < 1")

    def __str__(self) -> str:
        return f"{self.name} (N, D, V = {self.n}, {self.d}, {self.v})"


# D and V as in the models' published configurations; 8,192 tokens are one training sequence or a
# small batch. `tiny` divides by nothing, for CPUs and tests.
CASES = {
    case.name: case
    for case in (
        Case("gemma2-2b", 8192, 2304, 256_000),
        Case("gemma3-270m", 8192, 640, 262_144),
        Case("llama3.2-1b", 8192, 2048, 128_256),
        Case("llama3-8b", 8192, 4096, 128_256),
        Case("mistral-7b", 8192, 4096, 32_000),
        Case("qwen2.5-7b", 8192, 3584, 152_064),
        Case("smollm2-135m", 8192, 576, 49_152),
        Case("tiny", 127, 72, 1_021),
    )
}


def find(name: str, n: int | None = None) -> Case:
    """The case of that name, or a head "DxV", with N replaced by `n` if given.

    ValueError lists the valid names.
    """
    d, x, v = name.partition("x")
    if x and d.isdecimal() and v.isdecimal():
        case = Case(name, 8192, int(d), int(v))
    elif name in CASES:
        case = CASES[name]
    else:
        raise ValueError(f"no case {name!r}; must be DxV or one of {', '.join(CASES)}")
    return case if n is None else dataclasses.replace(case, n=n)
