"""`python -m trainer.cli`, as torchrun calls it."""

from trainer.cli.main import main

main()
