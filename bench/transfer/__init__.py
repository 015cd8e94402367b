"""Scattered reads between two processes: Baton's transfer engine beside its peers, in one run.

``make bench-transfer`` runs it. In order of the way from a case to the report:

* ``cases``: what is read; ``memory``: the pools it is read from and into.
* ``systems``: one module per system; ``worker``: the process that an end of one runs in.
* ``before``: another build of ours, to be measured beside the present one.
* ``runner``: takes turns over the systems; ``host``: what else the machine did meanwhile.
* ``reporting``: what came out, as results, bars, tables, a report and a plot.

A system's ends run in an environment of their own that has little more than numpy, so ``cases``,
``memory``, ``worker`` and ``systems`` import nothing but that at their top.
"""
