"""The HTTP interfaces, one file per protocol."""
