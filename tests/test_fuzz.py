"""A short run of `make fuzz`."""

import asyncio

import pytest

from tests.fuzz import fuzz, fuzz_decoders


@pytest.mark.slow
def test_damaged_inputs_are_read_refused_or_found():
    outcomes = fuzz(300, seed=0)
    assert sum(outcomes.values()) == 300
    assert all(outcomes[f"{kind} {end}"] for kind in ("parquet", "image") for end in ("read", "refused")), outcomes


@pytest.mark.slow
def test_damaged_images_that_clients_send_are_decoded_or_refused():
    outcomes = asyncio.run(fuzz_decoders(300, seed=0))
    assert sum(outcomes.values()) == 300 and outcomes["body read"] and outcomes["body refused"], outcomes
