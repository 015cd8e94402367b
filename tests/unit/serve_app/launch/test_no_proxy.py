from __future__ import annotations

import pytest

from serve_app.launch.no_proxy import without_proxy


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        ({}, {"no_proxy": "h,127.0.0.2"}),
        ({"no_proxy": ""}, {"no_proxy": "h,127.0.0.2"}),
        ({"no_proxy": "a, h"}, {"no_proxy": "a,h,127.0.0.2"}),
        ({"NO_PROXY": "a"}, {"NO_PROXY": "a", "no_proxy": "a,h,127.0.0.2"}),
        ({"NO_PROXY": "a", "no_proxy": "b"}, {"NO_PROXY": "a", "no_proxy": "b,h,127.0.0.2"}),
        (
            {"no_grpc_proxy": "", "no_proxy": "a"},
            {"no_grpc_proxy": "h,127.0.0.2", "no_proxy": "a,h,127.0.0.2"},
        ),
        ({"http_proxy": "http://p:1"}, {"http_proxy": "http://p:1", "no_proxy": "h,127.0.0.2"}),
    ],
)
def test_hosts_are_excepted_beside_what_was_said(
    said: dict[str, str], becomes: dict[str, str]
) -> None:
    assert without_proxy(said, ("h", "127.0.0.2")) == becomes
