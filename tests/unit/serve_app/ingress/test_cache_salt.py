"""What becomes of a key and a client's own salt."""

from __future__ import annotations

import pytest

from serve_app.ingress.cache_salt import cache_salt, salt_of_key

KEYS = (b"first-key", b"second-key")


def test_keys_differ_and_a_key_is_the_same_in_every_process() -> None:
    first, second = (cache_salt(salt_of_key(key), None) for key in KEYS)
    assert first != second
    # As another replica of the ingress makes it, and here openssl.
    assert first == "ab5d49fc083f818041a5770783fff299dc85dd4236de4ff33432872c2efa2a7b"


@pytest.mark.parametrize("key", KEYS)
def test_a_salt_of_the_client_goes_on_keeping_its_requests_apart(key: bytes) -> None:
    salt = salt_of_key(key)
    salts = [cache_salt(salt, own) for own in (None, "blue", "blue ", "grün", "x" * 1024)]
    assert len(set(salts)) == len(salts)
    assert salts == [cache_salt(salt, own) for own in (None, "blue", "blue ", "grün", "x" * 1024)]


def test_a_client_that_knows_its_salt_does_not_get_that_of_another_key() -> None:
    mine, theirs = (salt_of_key(key) for key in KEYS)
    theirs_made = cache_salt(theirs, None)
    assert theirs_made not in {cache_salt(mine, own) for own in (theirs_made, theirs.hex())}


def test_neither_shows_the_key_and_engines_take_it() -> None:
    for key in KEYS:
        salt = salt_of_key(key)
        assert key not in salt
        made = cache_salt(salt, "blue")
        assert key.decode() not in made
        assert 1 <= len(made) <= 1024  # what vLLM allows
