"""How the keys and values of a block's tokens lie within one KV head's part of it. Pure.

vLLM calls that part ``[N, C]``: tokens, and content (key and value). Most attention backends mean
it: a token's content is one run of bytes. The CPU backend looks at the same memory in its own way,
so that a block of 64 tokens is not two blocks of 32 behind each other. What all of them have in
common: such a cell is a row of *strips*, and in each strip every token has the same number of
bytes, behind those of the token before it::

    tokens     | t0 key value | t1 key value | ...                         one strip
    cpu-vec    | t0 t1 ... key[0] | t0 t1 ... key[1] | ... | t0 value | t1 value ...

Blocks of different sizes are translated strip by strip. A packing that is not known here is never
taken apart: it hands over between blocks of one size only.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = "tokens"
UNKNOWN_TOKENS = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """One way to pack a cell.

    Attributes:
        name: compared between owner and reader.
        strips: ``(count, bytes of one token)``, in order.
        granule: tokens that may not be separated; :data:`UNKNOWN_TOKENS` means those of a block.
    """

    name: str
    strips: tuple[tuple[int, int], ...]
    granule: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all strips."""
        return sum(count * width for count, width in self.strips)


def token_major(content_bytes: int) -> Packing:
    """Each token's content in one run, wherever the next token's is."""
    return Packing(TOKENS, ((1, content_bytes),), 1)


def cpu_packing(isa: str, head_size: int, itemsize: int) -> Packing:
    """What vLLM's CPU attention does with the instruction set ``isa``, as vLLM names it."""
    values = head_size * itemsize
    if isa in ("vec", "vec16"):
        # Keys transposed: one strip for every element. Values token by token.
        return Packing("cpu-vec", ((head_size, itemsize), (1, values)), 1)
    if isa == "amx" and head_size % 16 == 0:
        # Keys in tiles of 16 tokens, values in tiles of 16 elements for all tokens in pairs.
        return Packing("cpu-amx", ((1, values), (head_size // 16, 16 * itemsize)), 16)
    return Packing(f"cpu-{isa}", ((1, 2 * values),), UNKNOWN_TOKENS)
