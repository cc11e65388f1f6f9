"""Patterns for people, and the one expression that stands for a set of names."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_runtime.module_names import count_by_pattern, matching_expression


def test_a_number_that_varies_is_a_star_and_one_that_does_not_stays() -> None:
    names = ["blocks.0.attn.to_out.0", "blocks.1.attn.to_out.0", "blocks.1.ff.net.2", "proj_out"]
    assert count_by_pattern(names) == {"blocks.*.attn.to_out.0": 2, "blocks.1.ff.net.2": 1, "proj_out": 1}


def test_names_that_differ_in_their_block_alone_share_one_short_expression() -> None:
    names = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("attn.to_k", "attn.to_q")]
    assert matching_expression(names) == r"blocks\.(?:0|1|2)(?:\.attn\.to_k|\.attn\.to_q)"


def test_blocks_of_unequal_depth_are_told_apart() -> None:
    names = [f"down.{i}.layers.{j}.to_q" for i, depth in ((1, 2), (2, 10)) for j in range(depth)]
    expression = matching_expression(names)
    assert all(re.fullmatch(expression, name) for name in names)
    assert not re.fullmatch(expression, "down.1.layers.5.to_q")
    assert len(expression) < 200


@pytest.mark.parametrize("name", ["blocks.10.to_q", "blocks.0.to_qx", "xblocks.0.to_q", "blocks.0xto_q"])
def test_a_name_outside_the_set_never_matches(name: str) -> None:
    assert not re.fullmatch(matching_expression(["blocks.0.to_q", "blocks.1.to_q"]), name)


PART = st.sampled_from(["a", "b_c", "0", "1", "2", "17"])
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)


@given(st.sets(NAME, min_size=1, max_size=25), st.sets(NAME, max_size=25))
def test_the_expression_matches_exactly_the_set(names: set[str], others: set[str]) -> None:
    expression = matching_expression(names)
    assert {name for name in names | others if re.fullmatch(expression, name)} == names
