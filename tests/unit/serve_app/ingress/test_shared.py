from __future__ import annotations

import asyncio

from serve_app.ingress.shared import Shared


class Work:
    """Work that ends when it is told to; each time it returns how often it ran."""

    def __init__(self) -> None:
        self.runs = 0
        self.end = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        run = self.runs
        await self.end.wait()
        if run == 13:
            raise OSError("unlucky")
        return run


def test_all_who_ask_meanwhile_share_one_run() -> None:
    async def main() -> None:
        work = Work()
        one: Shared[int] = Shared(work, keep_s=0.0)
        asking = [asyncio.ensure_future(one.get()) for _ in range(50)]
        await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.sleep(0)
        work.end.set()

        told = await asyncio.gather(*asking, return_exceptions=True)

        assert isinstance(told[0], asyncio.CancelledError)
        assert told[1:] == [1] * 49
        assert await one.get() == 2

    asyncio.run(main())


def test_a_result_is_kept_for_a_while_after_its_end() -> None:
    now = 100.0

    async def main() -> None:
        nonlocal now
        work = Work()
        work.end.set()
        one: Shared[int] = Shared(work, keep_s=1.0, clock=lambda: now)

        assert await one.get() == 1
        now += 0.9
        assert await one.get() == 1
        now += 0.2
        assert await one.get() == 2

    asyncio.run(main())


def test_an_error_goes_to_those_who_waited_and_is_not_kept() -> None:
    async def main() -> None:
        work = Work()
        work.runs = 12
        work.end.set()
        one: Shared[int] = Shared(work, keep_s=60.0)

        told = await asyncio.gather(one.get(), one.get(), return_exceptions=True)

        assert [type(error) for error in told] == [OSError, OSError]
        assert await one.get() == 14

    asyncio.run(main())
