"""`python -m shardio.cli`: the command where it is not on the PATH."""

from shardio.cli.main import main

main()
