"""A thread that copies, in small steps, so that short copies need not wait for long ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

import torch

from transfer.errors import Phase, TransferCancelled

_OVER: Final = object()


class CopyThread:
    """Does the steps of several copies by turns, on a thread and a stream of its own.

    Args:
        name: of the thread.
        device: whose stream it is; none if that is the CPU.
        on_end: called when a copy has ended, mostly on that thread.
    """

    def __init__(self, name: str, device: torch.device, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=name, initializer=_use_own_stream, initargs=(device,)
        )

    def submit(self, steps: Iterator[None]) -> Future[None]:
        """Begins a copy; every item of ``steps`` is one step. Any thread; does not block.

        Returns:
            done when the steps are over, with what one of them raised, or with an exception
            because the thread is closed or its stream could not be made.
        """
        copy: Future[None] = Future()
        self._go_on(copy, steps)
        return copy

    def close(self) -> None:
        """Ends the thread after the step that it is at. Safe to call twice."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _go_on(self, copy: Future[None], steps: Iterator[None]) -> None:
        try:
            turn = self._executor.submit(_step, steps)
        except RuntimeError as error:
            self._end(copy, error)
        else:
            turn.add_done_callback(partial(self._after_step, copy, steps))

    def _after_step(self, copy: Future[None], steps: Iterator[None], turn: Future[object]) -> None:
        if turn.cancelled():
            self._end(copy, TransferCancelled("the copy thread is closed", phase=Phase.READ))
        elif (error := turn.exception()) is not None:
            self._end(copy, error)
        elif turn.result() is _OVER:
            self._end(copy, None)
        else:
            self._go_on(copy, steps)

    def _end(self, copy: Future[None], error: BaseException | None) -> None:
        if error is None:
            copy.set_result(None)
        else:
            copy.set_exception(error)
        self._on_end()


def _step(steps: Iterator[None]) -> object:
    # As vLLM runs a model: what it allocates so can be written to only so.
    with torch.inference_mode():
        return next(steps, _OVER)


def _use_own_stream(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.set_stream(torch.Stream(device))
