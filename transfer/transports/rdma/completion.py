"""How work requests end, and which of our errors that is."""

from __future__ import annotations

from enum import IntEnum

from transfer.errors import (
    FatalError,
    HandoffRefused,
    PeerUnreachable,
    Phase,
    ProtocolError,
    RegistrationError,
    TransferError,
)


class Status(IntEnum):
    """``enum ibv_wc_status``, as far as reads over reliable connections can end so."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    BAD_RESP_ERR = 7
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    REM_ABORT_ERR = 16
    FATAL_ERR = 19
    RESP_TIMEOUT_ERR = 20
    GENERAL_ERR = 21


_LOCAL_MEMORY = "the device may not write to the local memory"
_KINDS: dict[int, tuple[type[TransferError], str]] = {
    Status.LOC_LEN_ERR: (FatalError, "a read is longer than the device allows"),
    Status.LOC_QP_OP_ERR: (RegistrationError, _LOCAL_MEMORY),
    Status.LOC_PROT_ERR: (RegistrationError, _LOCAL_MEMORY),
    Status.LOC_ACCESS_ERR: (RegistrationError, _LOCAL_MEMORY),
    Status.BAD_RESP_ERR: (ProtocolError, "the owner's device answered out of turn"),
    Status.REM_INV_REQ_ERR: (ProtocolError, "the owner's device does not take such reads"),
    Status.REM_ACCESS_ERR: (HandoffRefused, "the owner's device does not let its memory be read"),
    Status.REM_OP_ERR: (PeerUnreachable, "the owner's device failed"),
    Status.RETRY_EXC_ERR: (PeerUnreachable, "the owner's device does not answer"),
    Status.RNR_RETRY_EXC_ERR: (PeerUnreachable, "the owner's device stayed busy"),
    Status.WR_FLUSH_ERR: (PeerUnreachable, "the connection was ended"),
}


def error_of(status: int, device: str, peer: str, handoff_id: str) -> TransferError:
    """What a status other than success means.

    Retryable is what a new queue pair, or another way, may put right.
    """
    try:
        name = Status(status).name
    except ValueError:
        name = f"status {status}"
    kind, why = _KINDS.get(status, (PeerUnreachable, "the read failed"))
    return kind(f"{why} ({name} from {device})", phase=Phase.READ, peer=peer, handoff_id=handoff_id)
