"""A short run of `make fuzz`."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.slow
def test_damaged_inputs_are_read_refused_or_found():
    outcomes = fuzz(300, seed=0)
    assert sum(outcomes.values()) == 300
    assert all(outcomes[f"{kind} {end}"] for kind in ("parquet", "image") for end in ("read", "refused")), outcomes
