"""The application: its settings, its two fronts, and the `baton` command."""
