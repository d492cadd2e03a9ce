"""`python -m shardio.cli`, as torchrun calls it."""

from shardio.cli.main import main

main()
