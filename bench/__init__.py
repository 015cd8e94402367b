"""Benchmarks: against peers, interleaved in one run, medians and ratios."""
