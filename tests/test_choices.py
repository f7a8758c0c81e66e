"""The table of choices between ways to compute an op, and how a run overrides it."""

import pytest
import torch

from unpadded_kernels import choices
from unpadded_kernels.choices import CHOICES, chosen, override


@pytest.fixture
def sm_90(monkeypatch):
    monkeypatch.setattr(choices, "generation", lambda device: 90)


def test_every_op_has_a_value_for_every_generation():
    for values in CHOICES.values():
        assert values.keys() == {80, 90, 100} and set(values.values()) <= {"library", "triton", "hopper"}


def test_a_choice_depends_on_the_generation_and_on_fp32(sm_90):
    assert chosen("linear_activation", torch.empty(2, 2, dtype=torch.float16)) != "library"
    assert chosen("linear_activation", torch.empty(2, 2)) == "library"


def test_an_override_ends_with_its_block(sm_90):
    x = torch.empty(2, 2, dtype=torch.float16)
    with override(attention="hopper"):
        with override(linear_activation="library", attention="triton"):
            assert (chosen("linear_activation", x), chosen("attention", x)) == ("library", "triton")
        assert (chosen("linear_activation", x), chosen("attention", x)) == ("triton", "hopper")
    assert (chosen("linear_activation", x), chosen("attention", x)) == ("triton", "triton")


def test_an_unknown_op_cannot_be_overridden():
    with (
        pytest.raises(ValueError, match=r"no choice for linar: use an op of choices\.CHOICES"),
        override(linar="triton"),
    ):
        pass
