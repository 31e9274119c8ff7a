"""Cases are found by name."""

import pytest

from benchmarks.inputs import cases


def test_a_case_is_found_by_name_and_takes_another_n():
    assert cases.find("gemma2-2b") == cases.Case("gemma2-2b", 8192, 2304, 256_000)
    assert cases.find("llama3-8b", 2048) == cases.Case("llama3-8b", 2048, 4096, 128_256)


def test_a_head_without_a_name_is_a_case():
    assert cases.find("72x1021", 5) == cases.Case("72x1021", 5, 72, 1021)
    with pytest.raises(ValueError, match="D=0"):
        cases.find("0x7")


def test_every_named_model_of_the_readme_is_a_case():
    named = "gemma2-2b gemma3-270m llama3.2-1b llama3-8b mistral-7b qwen2.5-7b smollm2-135m tiny"
    assert list(cases.CASES) == named.split()


def test_a_wrong_case_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'gemma'; must be DxV or one of gemma2-2b, .*, tiny"):
        cases.find("gemma")
    with pytest.raises(ValueError, match="N=0"):
        cases.find("tiny", 0)
