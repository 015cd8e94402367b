"""One connection to one etcd member. The only place that knows the client library.

Calls go to the stubs that ``pyetcd`` generated, with a deadline each, and foreign exceptions are
translated here. A connection that failed is thrown away:
:class:`~transfer.discovery.etcd_connector.EtcdConnector` then makes one to the next member.
"""

from __future__ import annotations

import importlib
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transfer.discovery.listing import KeyValue, Listing
from transfer.discovery.settings import Endpoint, EtcdSettings
from transfer.errors import ConfigurationError, Phase

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    # Without this a hung member is not left for minutes, whatever keepalive_timeout_ms says.
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Else the lease and the watch would share one TCP connection, and one hang.
    ("grpc.use_local_subchannel_pool", 1),
    # Else http_proxy and the like count even for 127.0.0.1: etcd is part of the system.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
)


class EtcdUnavailable(Exception):
    """This member did not do it; another one, or a later try, may."""


class EtcdUnauthenticated(EtcdUnavailable):
    """The login is no longer good; a fresh connection logs in anew."""


class LeaseLost(Exception):
    """The lease ran out or was revoked, and every key under it is gone."""


class HistoryCompacted(Exception):
    """The revision asked for is no longer kept; list again."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What was granted; ``ttl_s`` is how long it lives without being refreshed."""

    lease_id: int
    ttl_s: int


def load_pyetcd() -> tuple[ModuleType, ModuleType]:
    """Import ``grpc`` and pyetcd's stubs.

    Raises:
        ConfigurationError: not installed; names the package.
    """
    try:
        return importlib.import_module("grpc"), importlib.import_module("pyetcd.etcdrpc")
    except ImportError as error:
        raise ConfigurationError(
            f"etcd discovery needs the package etcd-sdk-python ({error}): "
            "pip install etcd-sdk-python protobuf",
            phase=Phase.DISCOVER,
        ) from error


class EtcdClient:
    """Calls to one member, each with a deadline of ``timeout_s``.

    Any thread may call; :meth:`close` from another thread ends calls that are under way.

    Every call raises ``EtcdUnavailable`` (or its subclass) when the member cannot do it now, and
    ``ConfigurationError`` when etcd refuses the user or the request for good.
    """

    def __init__(self, endpoint: Endpoint, settings: EtcdSettings, timeout_s: float) -> None:
        self._grpc, self._rpc = load_pyetcd()
        self._endpoint = endpoint
        self._user = settings.user
        self._timeout_s = timeout_s
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._channel = self._open(settings)
        self._kv = self._rpc.KVStub(self._channel)
        self._leases = self._rpc.LeaseStub(self._channel)
        try:
            if settings.user:
                self._authenticate(settings)
        except (EtcdUnavailable, ConfigurationError):
            self._channel.close()
            raise

    def __repr__(self) -> str:
        return f"<EtcdClient {self._endpoint}>"

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()

    def list_prefix(self, prefix: str) -> Listing:
        """All keys under a prefix, at one revision that a majority agrees on."""
        with self.translated():
            request = self._rpc.RangeRequest(key=prefix.encode(), range_end=_end_of(prefix))
            answer = self._kv.Range(request, self._timeout_s, metadata=self._metadata)
        return Listing(answer.header.revision, tuple(_key_value(kv) for kv in answer.kvs))

    def get(self, key: str) -> KeyValue | None:
        """One key, ``None`` if it is not there."""
        with self.translated():
            request = self._rpc.RangeRequest(key=key.encode())
            answer = self._kv.Range(request, self._timeout_s, metadata=self._metadata)
        return _key_value(answer.kvs[0]) if answer.kvs else None

    def put(self, key: str, value: bytes, lease_id: int) -> int:
        """Write a key under a lease, whatever was there; returns the revision.

        Raises:
            LeaseLost: there is no such lease.
        """
        with self.translated():
            request = self._rpc.PutRequest(key=key.encode(), value=value, lease=lease_id)
            answer = self._kv.Put(request, self._timeout_s, metadata=self._metadata)
        return int(answer.header.revision)

    def put_if_unchanged(
        self, key: str, value: bytes, lease_id: int, mod_revision: int
    ) -> int | None:
        """Write a key if nobody wrote it since ``mod_revision`` (0: if it is not there).

        Returns:
            The revision, or ``None`` if somebody did. After a retry that may have been oneself.

        Raises:
            LeaseLost: there is no such lease.
        """
        compare = self._rpc.Compare(
            key=key.encode(),
            target=self._rpc.Compare.MOD,
            result=self._rpc.Compare.EQUAL,
            mod_revision=mod_revision,
        )
        put = self._rpc.PutRequest(key=key.encode(), value=value, lease=lease_id)
        return self._transact(compare, self._rpc.RequestOp(request_put=put))

    def delete_if_equal(self, key: str, value: bytes) -> None:
        """Delete a key if it still has this value."""
        compare = self._rpc.Compare(
            key=key.encode(),
            target=self._rpc.Compare.VALUE,
            result=self._rpc.Compare.EQUAL,
            value=value,
        )
        delete = self._rpc.DeleteRangeRequest(key=key.encode())
        self._transact(compare, self._rpc.RequestOp(request_delete_range=delete))

    def _transact(self, compare: Any, operation: Any) -> int | None:
        with self.translated():
            request = self._rpc.TxnRequest(compare=[compare], success=[operation])
            answer = self._kv.Txn(request, self._timeout_s, metadata=self._metadata)
        return int(answer.header.revision) if answer.succeeded else None

    def grant(self, ttl_s: int) -> Lease:
        """Make a lease; etcd may make it longer than asked."""
        with self.translated():
            request = self._rpc.LeaseGrantRequest(TTL=ttl_s)
            answer = self._leases.LeaseGrant(request, self._timeout_s, metadata=self._metadata)
        return Lease(int(answer.ID), int(answer.TTL))

    def refresh(self, lease_id: int) -> None:
        """Keep a lease alive for another ttl.

        Raises:
            LeaseLost: etcd answered that it has none of it left; it reports no error for that.
        """
        with self.translated():
            requests = iter([self._rpc.LeaseKeepAliveRequest(ID=lease_id)])
            answers = self._leases.LeaseKeepAlive(
                requests, self._timeout_s, metadata=self._metadata
            )
            answer = next(answers, None)
            answers.cancel()
        if answer is None:
            raise EtcdUnavailable(f"etcd at {self._endpoint} ended a keepalive without an answer")
        if answer.TTL <= 0:
            raise LeaseLost

    def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys; one that is gone already is all right."""
        try:
            with self.translated():
                request = self._rpc.LeaseRevokeRequest(ID=lease_id)
                self._leases.LeaseRevoke(request, self._timeout_s, metadata=self._metadata)
        except LeaseLost:
            return

    def watch(self, prefix: str, revision: int) -> WatchStream:
        """Follow a prefix from a revision on, including it."""
        create = self._rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_end_of(prefix), start_revision=revision
        )
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put(self._rpc.WatchRequest(create_request=create))
        # Asks etcd to break the stream when its member loses the majority, rather than stay mute.
        metadata = (*self._metadata, ("hasleader", "true"))
        with self.translated():
            call = self._rpc.WatchStub(self._channel).Watch(
                iter(requests.get, None), metadata=metadata
            )
        return WatchStream(self, call, requests)

    def _open(self, settings: EtcdSettings) -> Any:
        tls = self._endpoint.scheme == "https" or (
            not self._endpoint.scheme and settings.has_tls_files
        )
        if not tls:
            return self._grpc.insecure_channel(self._endpoint.netloc, options=CHANNEL_OPTIONS)
        try:
            # Read anew for every connection, so that renewed certificates are taken up.
            credentials = self._grpc.ssl_channel_credentials(
                *(
                    Path(path).read_bytes() if path else None
                    for path in (settings.tls_ca, settings.tls_key, settings.tls_cert)
                )
            )
        except OSError as error:
            raise EtcdUnavailable(f"cannot read a TLS file: {error}") from error
        return self._grpc.secure_channel(
            self._endpoint.netloc, credentials, options=CHANNEL_OPTIONS
        )

    def _authenticate(self, settings: EtcdSettings) -> None:
        try:
            # Read anew for every connection, like the TLS files.
            user, password = settings.credentials()
        except ConfigurationError as error:
            raise EtcdUnavailable(error.message) from error
        request = self._rpc.AuthenticateRequest(name=user, password=password)
        codes = self._grpc.StatusCode
        try:
            answer = self._rpc.AuthStub(self._channel).Authenticate(request, self._timeout_s)
        except self._grpc.RpcError as error:
            if error.code() in (codes.INVALID_ARGUMENT, codes.FAILED_PRECONDITION):
                raise ConfigurationError(
                    f"etcd at {self._endpoint} refused user {settings.user!r}: "
                    f"{error.details()}; correct user and password",
                    phase=Phase.DISCOVER,
                ) from error
            raise self._unavailable(error) from error
        # As plain metadata, not as call credentials: those gRPC refuses without TLS.
        self._metadata = (("token", answer.token),)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise this module's errors for those of gRPC."""
        codes = self._grpc.StatusCode
        try:
            yield
        except self._grpc.RpcError as error:
            code = error.code()
            if code is codes.NOT_FOUND:  # of the calls made here, only those with a lease say so
                raise LeaseLost from error
            if code is codes.OUT_OF_RANGE:
                raise HistoryCompacted from error
            # A login of before a change of users is reported as an invalid argument.
            if code is codes.UNAUTHENTICATED or (code is codes.INVALID_ARGUMENT and self._user):
                raise EtcdUnauthenticated(self._describe(error)) from error
            if code in (codes.INVALID_ARGUMENT, codes.PERMISSION_DENIED):
                raise self._refusal(error.details()) from error
            raise self._unavailable(error) from error
        except ValueError as error:  # grpc: the channel was closed
            raise EtcdUnavailable(f"etcd at {self._endpoint}: {error}") from error

    def _refusal(self, reason: str) -> ConfigurationError:
        """The error for what etcd will never do for this user."""
        who = f"user {self._user!r}" if self._user else "a client without user and password"
        return ConfigurationError(
            f"etcd at {self._endpoint} refused {who}: {reason}; grant the user read and write "
            "on /baton/, or correct user and password",
            phase=Phase.DISCOVER,
        )

    def _unavailable(self, error: Any) -> EtcdUnavailable:
        return EtcdUnavailable(self._describe(error))

    def _describe(self, error: Any) -> str:
        return f"etcd at {self._endpoint}: {error.code().name}: {error.details()}"


class WatchStream:
    """Changes under a prefix, as they happen.

    One thread iterates; :meth:`cancel` may come from any.
    """

    def __init__(self, client: EtcdClient, call: Any, requests: queue.SimpleQueue[Any]) -> None:
        self._client = client
        self._call = call
        self._requests = requests

    def cancel(self) -> None:
        """End the stream; the iteration raises ``EtcdUnavailable``."""
        self._requests.put(None)
        self._call.cancel()

    def __iter__(self) -> Iterator[Listing]:
        """First an empty listing once etcd has accepted the watch, then one for each change.

        Raises:
            HistoryCompacted: the revision to start from is gone.
            EtcdUnauthenticated: etcd refuses the watch; log in and list anew.
            EtcdUnavailable: the stream broke.
        """
        try:
            with self._client.translated():
                for answer in self._call:
                    if answer.compact_revision:
                        raise HistoryCompacted
                    if answer.canceled:
                        # "permission denied" among others: etcd says so for an expired login, too.
                        # The listing that comes before the next watch tells which it was.
                        raise EtcdUnauthenticated(
                            f"etcd cancelled the watch: {answer.cancel_reason or 'no reason given'}"
                        )
                    items = tuple(_change(event) for event in answer.events)
                    yield Listing(answer.header.revision, items)
        finally:
            self.cancel()
        raise EtcdUnavailable("etcd ended the watch")


def _end_of(prefix: str) -> bytes:
    """The key right behind all keys of a prefix (which ends in ``/`` here, so no carry)."""
    data = prefix.encode()
    return data[:-1] + bytes([data[-1] + 1])


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(_key(kv.key), bytes(kv.value), int(kv.mod_revision), int(kv.lease))


def _change(event: Any) -> KeyValue:
    deleted = event.type == event.DELETE
    value = None if deleted else bytes(event.kv.value)
    return KeyValue(_key(event.kv.key), value, int(event.kv.mod_revision))


def _key(key: bytes) -> str:
    # Keys are bytes; ones that are not text must not break the watch.
    return key.decode(errors="backslashreplace")
