#!/usr/bin/env bash
# Ray Serve 2.60.0: a request whose X-Request-Id holds a byte that is no UTF-8 is answered 500 by
# Serve's HTTP proxy, and the application is never asked, so no middleware of its own can answer
# 400. HTTP allows such bytes in a header's value (RFC 9110, section 5.5, obs-text), and any other
# header may hold them: the application gets those as they are.
#
# Seen: 200 without the header, 200 with the byte in X-Other, 500 with it in X-Request-Id, and the
# application had counted two requests by then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[serve]==2.60.0"
cat > "$folder/asked.py" <<'PYTHON'
import socket

from ray import serve
from starlette.requests import Request

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]


@serve.deployment
class Counting:
    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, request: Request) -> str:
        self.asked += 1
        return str(self.asked)


def status(header: bytes) -> tuple[str, str]:
    with socket.create_connection(("127.0.0.1", PORT), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + header + b"\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split()[1].decode(), body.decode(errors="replace")


serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Counting.bind())
seen = [status(b""), status(b"x-other: a\xff\r\n"), status(b"x-request-id: a\xff\r\n")]
print([code for code, _ in seen], "asked:", seen[1][1])
assert [code for code, _ in seen] == ["200", "200", "500"], seen
assert "3" in status(b"")[1].split(), "the application was asked"
PYTHON
cd "$folder" && RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" asked.py 2>"$folder/log" \
  || { tail -20 "$folder/log"; exit 1; }
