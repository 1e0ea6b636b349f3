"""The command line: one file per command, registered in :mod:`micro.cli.main`."""
