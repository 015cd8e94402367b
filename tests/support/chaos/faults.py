"""The rows of the chaos suite's table: every fault at every phase where it makes sense."""

from __future__ import annotations

from tests.support.chaos.clients import (
    break_streams,
    client_leaves,
    client_leaves_while_decoding,
    clients_do_not_read,
)
from tests.support.chaos.fault import Fault
from tests.support.chaos.links import (
    etcd_compacted,
    etcd_killed,
    etcd_member_lost,
    etcd_paused,
    lease_lost,
    link,
    links_damage,
    new_replica_without_etcd,
)
from tests.support.chaos.neighbours import (
    clock_set_back,
    metrics_flood,
    record_overwritten,
    rogue_owners,
    silent_strangers,
    slow_bodies,
)
from tests.support.chaos.processes import (
    engine_of_held,
    hang_at,
    hang_engine,
    held,
    kill_all_prefill,
    kill_at,
    kill_one_engine,
    kill_replica,
    owner,
)
from tests.support.chaos.refusals import bad_requests, too_many_requests
from tests.support.chaos.replicas import (
    hang_replica,
    kill_all_decode,
    kill_ingress,
    kill_proxy,
    redeploy,
    scale_down,
    terminate_replica,
)
from tests.support.chaos.requests import (
    equal_prompts,
    killer_prompt,
    long_request_ids,
    prompts_beyond_the_pool,
)
from tests.support.load.questions import Ended
from tests.support.network.link_relays import Link

OR_REFUSED = frozenset({Ended.OK, Ended.REFUSED})
OR_BROKEN = OR_REFUSED | {Ended.BROKEN}

KILLED = "prefill engine killed"
DECODE_KILLED = "decode engine killed"
LEFT = "client leaves"

FAULTS = [
    Fault(KILLED, "before it computes", kill_at("prefill.computing", engine_of_held)),
    Fault(KILLED, "before its answer", kill_at("prefill.answering", engine_of_held), quick=True),
    Fault(KILLED, "ticket at the router", kill_at("router.ticket", owner)),
    Fault(KILLED, "before the read", kill_at("reader.connecting", owner)),
    Fault(KILLED, "while it sends", kill_at("owner.sending", held), quick=True),
    Fault(KILLED, "before it confirms", kill_at("reader.confirming", owner)),
    Fault("prefill replica killed", "at any time", kill_replica("Prefill")),
    Fault("all prefill replicas killed", "at any time", kill_all_prefill),
    Fault(DECODE_KILLED, "before its read", kill_at("decode.accepted", engine_of_held)),
    Fault(DECODE_KILLED, "while it reads", kill_at("reader.reading", held)),
    Fault(DECODE_KILLED, "before it is confirmed", kill_at("reader.confirming", held)),
    Fault(DECODE_KILLED, "streams under way", kill_one_engine("decode"), quick=True),
    Fault("decode replica killed", "streams under way", kill_replica("Decode")),
    Fault("all decode replicas killed", "at any time", kill_all_decode, ends=OR_REFUSED),
    Fault(DECODE_KILLED, "streams that cannot go on", break_streams),
    Fault("prefill replica gets SIGTERM", "at any time", terminate_replica("Prefill")),
    Fault("decode replica gets SIGTERM", "streams under way", terminate_replica("Decode")),
    Fault("prefill replica hangs for good", "at any time", hang_replica("Prefill")),
    Fault("decode replica hangs for good", "streams under way", hang_replica("Decode")),
    Fault("one prefill replica fewer", "at any time", scale_down("Prefill")),
    Fault("one decode replica fewer", "streams under way", scale_down("Decode")),
    Fault("application deployed anew", "at any time", redeploy),
    Fault("ingress replica killed", "at any time", kill_ingress, ends=OR_BROKEN),
    Fault("Serve's proxy killed", "at any time", kill_proxy, ends=OR_BROKEN),
    Fault("prefill engine hangs 8 s", "before the read", hang_at("reader.connecting", owner)),
    Fault(
        "prefill engine hangs 8 s", "while it is read", hang_at("reader.reading", owner), quick=True
    ),
    Fault("prefill engine hangs 8 s", "before it confirms", hang_at("reader.confirming", owner)),
    Fault("decode engine hangs 8 s", "while it reads", hang_at("reader.reading", held)),
    Fault("decode engine hangs 8 s", "before it is confirmed", hang_at("reader.confirming", held)),
    Fault("decode engine hangs 8 s", "while it decodes", hang_engine("decode")),
    Fault(
        "links silent 8 s",
        "while blocks move",
        link(Link.SILENT, point="owner.sending"),
        quick=True,
    ),
    Fault("links silent 8 s", "before confirmation", link(Link.SILENT, point="reader.confirming")),
    Fault("links refused 8 s", "at any time", link(Link.REFUSED)),
    Fault("one of two links silent 8 s", "at any time", link(Link.SILENT, newest_only=True)),
    Fault("links at 1 MB a second for 8 s", "at any time", link(Link.OPEN, 1e6)),
    Fault("links at 50 kB a second for 8 s", "at any time", link(Link.OPEN, 50e3)),
    Fault("links damage blocks for 8 s", "at any time", links_damage),
    Fault("etcd killed for 8 s", "at any time", etcd_killed, quick=True),
    Fault("etcd paused for 8 s", "at any time", etcd_paused),
    Fault("one of three etcd members lost", "at any time", etcd_member_lost),
    Fault("etcd compacted under watches", "at any time", etcd_compacted),
    Fault("a worker's lease lost and regained", "at any time", lease_lost, quick=True),
    Fault("etcd away, prefill replica killed", "at any time", new_replica_without_etcd),
    Fault("workers' records overwritten", "at any time", record_overwritten(b"x")),
    Fault("wall clocks set back an hour", "at any time", clock_set_back),
    Fault("64 clients that send half a body", "at any time", slow_bodies),
    Fault("flood of metrics scrapes", "at any time", metrics_flood),
    Fault("silent strangers at owners", "at any time", silent_strangers),
    Fault("requests with equal prompts", "at any time", equal_prompts),
    Fault("one request with more prompts than prefill holds", "at once", prompts_beyond_the_pool),
    Fault("request ids of 4000 characters", "at any time", long_request_ids),
    Fault("prompt that kills prefill engines", "five times", killer_prompt),
    Fault("rogue owners", "at any time", rogue_owners),
]

ALONE = [
    Fault(LEFT, "queued at prefill", client_leaves("prefill.computing"), quick=True),
    Fault(LEFT, "prefill done", client_leaves("prefill.answering"), quick=True),
    Fault(LEFT, "ticket at the router", client_leaves("router.ticket"), quick=True),
    Fault(LEFT, "queued at decode", client_leaves("decode.accepted"), quick=True),
    Fault(LEFT, "before the read", client_leaves("reader.connecting"), quick=True),
    Fault(LEFT, "reading", client_leaves("reader.reading"), quick=True),
    Fault(LEFT, "waiting for confirmation", client_leaves("reader.confirming"), quick=True),
    Fault(LEFT, "decoding", client_leaves_while_decoding, quick=True),
    Fault("clients do not read", "streams under way", clients_do_not_read),
    Fault("too many requests", "all at once", too_many_requests, quick=True),
    Fault("bad requests", "one by one", bad_requests, quick=True),
]
"""Injected without other load."""
