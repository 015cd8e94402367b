"""A point in the work that the model has queued on its device."""

from __future__ import annotations

import torch


class DeviceEvent:
    """What was queued on the calling thread's stream when this was made.

    Made on the model thread; a device without streams has nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = (
            None
            if device.type == "cpu"
            else torch.accelerator.current_stream(device).record_event()
        )

    def wait(self) -> None:
        """Lets what is queued from now on, on the calling thread's stream, begin after it."""
        if self._event is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        """Blocks the calling thread until the device is through with it."""
        if self._event is not None:
            self._event.synchronize()
