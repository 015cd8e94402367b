"""The systems side by side: each module has an ``Owner`` and a ``Reader``."""
