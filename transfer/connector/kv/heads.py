"""Which KV heads a tensor-parallel rank holds, and from which ranks another one gets them. Pure.

vLLM shares the heads out in order. With more ranks than heads, neighbouring ranks hold the same
one::

    4 heads, 2 ranks     rank 0: 0 1     rank 1: 2 3
    2 heads, 4 ranks     rank 0: 0       rank 1: 0      rank 2: 1      rank 3: 1
"""

from __future__ import annotations

from dataclasses import dataclass

from transfer.errors import LayoutMismatch, Phase


@dataclass(frozen=True, slots=True)
class HeadRange:
    """KV heads ``first`` to ``stop - 1``, counted over the whole model."""

    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def __contains__(self, other: HeadRange) -> bool:
        return self.first <= other.first and other.stop <= self.stop

    def overlap(self, other: HeadRange) -> HeadRange:
        """The heads in both; may be empty."""
        first = max(self.first, other.first)
        return HeadRange(first, max(first, min(self.stop, other.stop)))


@dataclass(frozen=True, slots=True)
class Part:
    """What one reader rank has to do with one owner rank, for every hand-off.

    Attributes:
        owner_rank: of the owner's engine.
        heads: to read from it; empty when no rank of the reader's engine reads from it and this
            one has to tell it so.
        share: how many ranks of the reader's engine, this one among them, read from it.
    """

    owner_rank: int
    heads: HeadRange
    share: int


def heads_of(rank: int, tp_size: int, total_heads: int) -> HeadRange:
    """The heads that one rank holds.

    Raises:
        LayoutMismatch: neither number divides the other; vLLM does not start such an engine.
    """
    if tp_size <= total_heads and total_heads % tp_size == 0:
        each = total_heads // tp_size
        return HeadRange(rank * each, (rank + 1) * each)
    if tp_size % total_heads == 0:
        head = rank // (tp_size // total_heads)
        return HeadRange(head, head + 1)
    raise LayoutMismatch(
        f"{total_heads} KV heads cannot be shared out to {tp_size} ranks; one number must divide "
        "the other",
        phase=Phase.READ,
    )


def parts_of(rank: int, tp_size: int, owner_tp_size: int, total_heads: int) -> tuple[Part, ...]:
    """From which owner ranks a reader rank reads which heads, and whom it tells that nobody does.

    Together, the parts of all reader ranks name every owner rank, and the heads of one rank's
    parts are its own, each once. Where several owner ranks hold a head, readers spread over them.

    Raises:
        LayoutMismatch: as :func:`heads_of`.
    """
    sources = [_sources(reader, tp_size, owner_tp_size, total_heads) for reader in range(tp_size)]
    shares = [sum(owner in source for source in sources) for owner in range(owner_tp_size)]
    parts = [Part(owner, heads, shares[owner]) for owner, heads in sources[rank].items()]
    parts += [
        Part(owner, HeadRange(0, 0), 1)
        for owner in range(rank, owner_tp_size, tp_size)
        if not shares[owner]
    ]
    return tuple(parts)


def parts_to_tell(rank: int, tp_size: int, owner_tp_size: int) -> tuple[Part, ...]:
    """The owner ranks that a reader rank tells that its engine reads nothing at all.

    Together, all reader ranks tell every owner rank, each once, whatever heads are where.
    """
    return tuple(Part(owner, HeadRange(0, 0), 1) for owner in range(rank, owner_tp_size, tp_size))


def _sources(rank: int, tp_size: int, owner_tp_size: int, total_heads: int) -> dict[int, HeadRange]:
    wanted = heads_of(rank, tp_size, total_heads)
    if owner_tp_size > total_heads:
        # Every owner has one head, and several owners have the same.
        copies = owner_tp_size // total_heads
        readers = max(1, tp_size // total_heads)
        copy = rank % readers * copies // readers
        owners = [head * copies + copy for head in range(wanted.first, wanted.stop)]
    else:
        each = total_heads // owner_tp_size
        owners = list(range(wanted.first // each, (wanted.stop - 1) // each + 1))
    return {owner: wanted.overlap(heads_of(owner, owner_tp_size, total_heads)) for owner in owners}
