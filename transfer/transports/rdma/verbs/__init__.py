"""RDMA devices by pyverbs. Nothing outside of this package imports it or knows its names."""
