"""The prefill and decode replicas, and the hand-off between them."""
