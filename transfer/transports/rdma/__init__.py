"""Reads over RDMA: one-sided, by reliable connections that are brought up over control."""
