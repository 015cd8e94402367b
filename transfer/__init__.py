"""Moves KV-cache blocks between the memories of vLLM workers.

``transfer`` knows nothing of Ray: it works under Ray Serve, under a stock vLLM server and alone.
Imports go one way: ``connector -> engine -> {transports, discovery} -> {ticket, settings, ...} ->
{types, errors}``.
"""
