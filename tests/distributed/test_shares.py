"""Ranks of a mesh, as processes on a CPU, against one process: numbers, exchanges, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.rank_tools import MODELS, Case, Found, on_ranks, run

pytestmark = pytest.mark.timeout(900)  # the first test of a size waits for all cases of its ranks

PAIR = [
    Case(family, config, *mesh)
    for family in MODELS
    for config, mesh in (("pab", (2, 1)), ("guidance", (2, 1)), ("off", (1, 2)), ("pab", (1, 2)), ("all", (1, 2)))
]
FOUR = [Case(family, config, 2, 2) for family in MODELS for config in ("pab", "all")] + [
    Case(family, "off", 1, 4) for family in ("open_sora", "latte")
]


def all_of(cases: list[Case]) -> dict[str, Found]:
    return {str(case): run(case, mesh=True) for case in cases}


@functools.cache
def alone(family: str, config: str) -> Found:
    return run(Case(family, config), mesh=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], list[Found]]:
    """What each rank of a case found; processes are started once for each number of ranks."""

    @functools.cache
    def started(size: int) -> list[Any]:
        work = functools.partial(all_of, PAIR if size == 2 else FOUR)
        return on_ranks(size, work, tmp_path_factory.mktemp(f"ranks-{size}"))

    return lambda case: [found[str(case)] for found in started(case.mesh.size)]


@pytest.mark.parametrize("case", [*PAIR, *FOUR], ids=str)
def test_ranks_together_are_one_process(case, ranks):
    expected = alone(case.family, case.config)
    torch.testing.assert_close(expected.again, expected.run, atol=0, rtol=0)
    for found in ranks(case):
        for actual in (found.run, found.again):
            torch.testing.assert_close(actual, expected.run, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.run, ranks(case)[0].run)


@pytest.mark.parametrize("case", [case for case in (*PAIR, *FOUR) if case.frames > 1], ids=str)
def test_only_computed_attention_across_frames_exchanges_rows(case, ranks):
    for found in ranks(case):
        assert found.exchanges
        for variant, quiet, planned, called in found.exchanges:
            assert called == planned, variant
            assert not (quiet and called[0]), variant
        assert any(sent for *_, (_, sent) in found.exchanges)


@pytest.mark.parametrize("case", [case for case in PAIR if case.config == "pab"], ids=str)
def test_slots_are_shared(case, ranks):
    whole = alone(case.family, case.config).slots
    shares = [found.slots for found in ranks(case)]
    assert max(shares) < 0.65 * whole
