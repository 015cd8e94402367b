"""RDMA beside perftest's ``ib_read_bw``, by turns on the same device.

``make bench-rdma`` runs it, on this machine's device or in the virtual machine of the tests. It is
:mod:`bench.transfer` with another peer, in two halves, since the machine takes its files with it:

* ``measure`` runs where the device is and prints a ``measurement``; ``profile``: what is read;
  ``perftest``: the peer.
* ``report`` takes that from its standard input and writes the page.
"""
