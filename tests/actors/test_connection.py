"""The cluster that a run connects to."""

import pytest

from actors.connection import connect


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "head"])
def test_an_address_that_is_none_is_told_before_anything_is_sent(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS={address} leads to no cluster .* give its head's HOST:PORT"):
        connect()
