"""The clients' keys: how they are made, read, recognised, limited and exchanged."""

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import Key
from serving.keys import EVERYBODY, PREFIX, Doorkeeper, Refused, bearer_token, new_key, read_keys
from umrg.mistake import Mistake


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(name: str, **limits: int) -> tuple[str, Key]:
    secret, digest = new_key()
    return f"Bearer {secret}", Key(name=name, sha256=digest, **limits)


def refusal(door: Doorkeeper, authorization: str | None) -> Refused:
    with pytest.raises(Refused) as refused, door.admit(authorization):
        raise AssertionError("it was let in")
    return refused.value


def enter(door: Doorkeeper, authorization: str, times: int = 1) -> None:
    """Requests one after another, each of which ends."""
    for _ in range(times):
        with door.admit(authorization):
            pass


def test_a_new_key_is_recognisable_long_and_never_the_same():
    secret, digest = new_key()
    assert re.fullmatch(rf"{PREFIX}[A-Za-z0-9_-]{{43}}", secret)  # 43 characters of base64 are 256 bits
    assert digest == hashlib.sha256(secret.encode()).hexdigest()
    assert len({new_key()[0] for _ in range(100)}) == 100


def test_each_key_is_known_by_its_name():
    keys = [made(f"client-{number}") for number in range(5)]
    door = Doorkeeper([key for _, key in keys])
    assert door.needs_key
    for authorization, key in keys:
        with door.admit(authorization) as owner:
            assert owner == key.name


def test_without_keys_everybody_is_let_in():
    door = Doorkeeper(None)
    assert not door.needs_key
    for authorization in (None, "Bearer whatever"):
        with door.admit(authorization) as owner:
            assert owner == EVERYBODY


def test_where_keys_are_needed_and_there_are_none_nobody_is_let_in():
    assert refusal(Doorkeeper([]), made("anna")[0]).status == 401


def test_an_unknown_key_is_refused_and_so_is_everything_that_is_none():
    authorization, key = made("anna")
    door = Doorkeeper([key])
    secret = authorization.removeprefix("Bearer ")
    # The digest that the service knows opens nothing.
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        secret,
        f"Basic {secret}",
        f"Bearer {secret}x",
        f"Bearer {key.sha256}",
    ):
        refused = refusal(door, wrong)
        assert refused.status == 401 and refused.retry_after is None and secret not in refused.detail


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_may_be_written_in_any_case(scheme):
    authorization, key = made("anna")
    with Doorkeeper([key]).admit(authorization.replace("Bearer", scheme)) as owner:
        assert owner == "anna"


@given(st.text())
def test_no_junk_is_a_token_or_breaks_the_door(junk):
    assert bearer_token(junk) is None or re.match("(?i)bearer +", junk)
    refused = refusal(Doorkeeper([made("anna")[1]]), junk)
    assert refused.status == 401


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1), st.integers(1, 5))
def test_every_visible_token_is_read_as_it_is(token, spaces):
    assert bearer_token(f"Bearer{' ' * spaces}{token}") == token


@given(st.text(max_size=20))
def test_junk_after_the_scheme_never_raises(junk):
    assert bearer_token(f"Bearer {junk}") in (None, junk.strip(" "))


def test_a_key_sends_as_many_requests_as_it_may_and_then_as_they_come_back():
    clock = Clock()
    authorization, key = made("anna", per_minute=60)
    door = Doorkeeper([key], clock=clock)
    enter(door, authorization, times=60)
    refused = refusal(door, authorization)
    assert refused.status == 429 and refused.retry_after == pytest.approx(1.0)
    clock.now += 1.5  # a minute has 60 requests: one a second
    enter(door, authorization)
    assert refusal(door, authorization).retry_after == pytest.approx(0.5)
    clock.now += 3600
    enter(door, authorization, times=60)
    assert refusal(door, authorization).status == 429


def test_one_keys_limits_are_not_anothers():
    (first, anna), (second, ben) = made("anna", per_minute=1), made("ben", per_minute=1)
    door = Doorkeeper([anna, ben], clock=Clock())
    enter(door, first)
    assert refusal(door, first).status == 429
    enter(door, second)


def test_a_key_has_as_many_requests_under_way_as_it_may():
    authorization, key = made("anna", concurrent=2)
    door = Doorkeeper([key])
    with door.admit(authorization), door.admit(authorization):
        refused = refusal(door, authorization)
        assert refused.status == 429 and refused.retry_after
    enter(door, authorization)


def test_a_request_that_fails_is_no_longer_under_way():
    authorization, key = made("anna", concurrent=1)
    door = Doorkeeper([key])
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), door.admit(authorization):
            raise error
    enter(door, authorization)


def test_a_refused_request_costs_nothing():
    clock = Clock()
    authorization, key = made("anna", per_minute=2, concurrent=1)
    door = Doorkeeper([key], clock=clock)
    with door.admit(authorization):
        for _ in range(5):
            refusal(door, authorization)
    enter(door, authorization)


def test_replicas_share_a_keys_limits_and_round_up():
    authorization, key = made("anna", per_minute=5, concurrent=3)
    doors = [Doorkeeper([key], sharers=2, clock=Clock()) for _ in range(2)]
    for door in doors:
        with door.admit(authorization), door.admit(authorization):
            assert "under way" in refusal(door, authorization).detail
        enter(door, authorization)
        assert "has sent" in refusal(door, authorization).detail
    lone = Doorkeeper([made("ben", per_minute=1)[1], key], sharers=100, clock=Clock())
    enter(lone, authorization)


def test_keys_are_exchanged_while_requests_are_under_way():
    (old, anna), (new, fresh) = made("anna", concurrent=1), made("ben")
    door = Doorkeeper([anna])
    with door.admit(old) as owner:
        door.replace([fresh])
        assert owner == "anna" and refusal(door, old).status == 401
    enter(door, new)


def test_what_a_key_has_used_stays_counted_when_keys_are_exchanged():
    clock = Clock()
    authorization, key = made("anna", per_minute=10, concurrent=1)
    door = Doorkeeper([key], clock=clock)
    enter(door, authorization, times=9)
    with door.admit(authorization):
        door.replace([key.model_copy(update={"per_minute": 20}), made("ben")[1]])
        assert "under way" in refusal(door, authorization).detail
    assert "has sent" in refusal(door, authorization).detail
    clock.now += 3  # one of the 20 of a minute
    enter(door, authorization)
    assert refusal(door, authorization).status == 429


def test_a_client_gets_another_secret_under_its_name():
    (old, key), (new, _) = made("anna", per_minute=2), made("anna")
    door = Doorkeeper([key], clock=Clock())
    enter(door, old)
    digest = hashlib.sha256(new.removeprefix("Bearer ").encode()).hexdigest()
    door.replace([key.model_copy(update={"sha256": digest})])
    assert refusal(door, old).status == 401
    enter(door, new)
    assert refusal(door, new).status == 429


def test_two_keys_of_one_name_or_secret_are_refused_and_the_old_ones_stay():
    authorization, key = made("anna")
    door = Doorkeeper([key])
    for second in (made("anna")[1], key.model_copy(update={"name": "ben"})):
        with pytest.raises(Mistake, match="anna"):
            door.replace([key, second])
    enter(door, authorization)


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"- name: anna\n  sha256: {'a' * 64}\n- {{name: ben, sha256: {'b' * 64}, per_minute: 5}}\n")
    anna, ben = read_keys(path)
    assert (anna.name, anna.per_minute) == ("anna", Key(name="x", sha256="0" * 64).per_minute)
    assert (ben.name, ben.sha256, ben.per_minute) == ("ben", "b" * 64, 5)


SECRET = new_key()[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "medreasoner key NAME"),
        ("[]", "medreasoner key NAME"),
        ("name: anna", "no list of keys"),
        ("- name: [", "not YAML at line 1"),
        ("- anna", "key 1 has no fields"),
        (f"- name: anna\n  sha256: {SECRET}", "key 1: sha256 is the key itself"),
        (f"- name: anna\n  sha256: x{SECRET}", "key 1: sha256: String should match"),
        (f"- name: anna\n  sha256: {'a' * 64}\n- name: {SECRET * 2}\n  sha256: {'b' * 64}", "key 2: name"),
        (f"- name: anna\n  secret: {SECRET}", "secret: Extra inputs"),
        (f"- name: anna\n  sha256: {'a' * 64}\n  concurrent: 0", "concurrent: Input should be greater than 0"),
        (f"- name: anna\n  sha256: {'a' * 64}\n- name: anna\n  sha256: {'b' * 64}", "two keys are named anna"),
        (f"- name: anna\n  sha256: {'a' * 64}\n- name: ben\n  sha256: {'a' * 64}", "are the same key"),
        (f"- name: anna\n  sha256: !!python/object/apply:os.system ['{SECRET}']", "not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_to_change_and_shows_no_secret(tmp_path, text, said):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(Mistake) as mistake:
        read_keys(path)
    assert str(path) in str(mistake.value) and said in str(mistake.value) and SECRET not in str(mistake.value)


def test_a_file_that_is_not_there_or_not_text_says_so(tmp_path):
    with pytest.raises(Mistake, match=r"missing\.yaml cannot be read \(No such file"):
        read_keys(tmp_path / "missing.yaml")
    with pytest.raises(Mistake, match="cannot be read"):
        read_keys(tmp_path)
    (tmp_path / "keys.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Mistake, match="it is not text"):
        read_keys(tmp_path / "keys.yaml")
