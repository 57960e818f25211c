"""The command line: `fastadv train` and the other commands."""
