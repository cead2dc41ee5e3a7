"""Pipelines on two ranks against one process, and what a mesh refuses while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.pipeline_ranks import MESHES, NAMES, REFUSED, everything, guidance_ends, pipeline_run
from tests.distributed.rank_tools import on_ranks

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_give_the_same_on_every_rank(name, ranks):
    expected = pipeline_run(name, None)
    for mesh in MESHES:
        for found in ranks:
            torch.testing.assert_close(found[f"{name}, {mesh}"], expected, atol=1e-5, rtol=1e-5)


def test_without_guidance_the_ranks_of_both_halves_do_the_same(ranks):
    expected = pipeline_run("wan t2v, two transformers", None, 1.0)
    for found in ranks:
        torch.testing.assert_close(found["no guidance"], expected, atol=1e-5, rtol=1e-5)


def test_guidance_may_end_within_a_run(ranks):
    expected = guidance_ends(None)
    for mesh in MESHES:
        for found in ranks:
            torch.testing.assert_close(found[f"ends, {mesh}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses(name, ranks):
    for found in ranks:
        with pytest.raises(ValueError, match=REFUSED[name][1]):
            raise ValueError(found[name])


def test_a_second_forward_that_never_comes_is_noticed(ranks):
    for found in ranks:
        assert "the second forward of the one before never came" in found["unfollowed"]
