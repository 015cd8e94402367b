"""The application: configuration, ingress and router, and the `baton` command."""
