"""A short run of `make fuzz`."""

import asyncio

import pytest

from tests.fuzz import fuzz, fuzz_decoders, fuzz_requests

PATIENCE = 120.0
"""Seconds after which something hangs, however busy the machine is; `make fuzz` allows what clients would."""


@pytest.mark.slow
def test_damaged_inputs_are_read_refused_or_found():
    outcomes = fuzz(300, seed=0)
    assert sum(outcomes.values()) == 300
    assert all(outcomes[f"{kind} {end}"] for kind in ("parquet", "image") for end in ("read", "refused")), outcomes


@pytest.mark.slow
def test_damaged_images_that_clients_send_are_decoded_or_refused():
    outcomes = asyncio.run(fuzz_decoders(300, 0, PATIENCE))
    assert sum(outcomes.values()) == 300 and outcomes["body read"] and outcomes["body refused"], outcomes


@pytest.mark.slow
def test_damaged_requests_are_answered_or_told_what_to_change():
    outcomes = asyncio.run(fuzz_requests(300, 0, PATIENCE))
    assert sum(outcomes.values()) == 300, outcomes
    assert {f"request {status}" for status in (200, 400, 401, 404, 405, 406, 413, 415, 422)} <= outcomes.keys(), (
        outcomes
    )
