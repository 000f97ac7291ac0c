"""Errors of the system that libraries say in their own words."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from fusion.errors import of_system


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_number_in_words_is_the_systems_error(number: int) -> None:
    found = of_system(SafetensorError(f"Error: I/O error: whatever (os error {number})"))
    assert found.errno == number


def test_other_words_stay_what_is_said() -> None:
    assert str(of_system(SafetensorError("header too large"))) == "header too large"
    given = OSError(errno.EACCES, "no")
    assert of_system(given) is given
