"""Run a command of `trainer`, and end it: what went wrong is told once, in words, and no rank is left behind."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.cli.flags import meant
from trainer.fit.run_folder import described
from trainer.ranks.failure import STDERR, rank, remedy, stop, tell

if TYPE_CHECKING:
    from trainer.cli.fit import TrainerCLI

LIGHTNING = ("fit", "validate")
OTHER_COMMANDS = ("predict", "export", "plan")  # they take no Lightning; each is imported when it is called


def execute(given: list[str]) -> None:
    """Run the command that is the first of the words `given`.

    Exits: 0 done, 1 failed, 2 words that mean nothing, 130 interrupted.
    """
    debug, command, cli = "--debug" in given, given[0], None
    with warnings.catch_warnings():
        if not debug:
            _ignore_advice()
        try:
            if not command.startswith("-") and command not in (commands := (*LIGHTNING, *OTHER_COMMANDS)):
                tell(f"trainer has no command {command!r}.{meant(command, commands)} It has: {', '.join(commands)}.")
                sys.exit(2)
            if command in OTHER_COMMANDS:
                import_module(f"trainer.cli.{command}").main(given[1:])
                return
            from trainer.cli.fit import TrainerCLI  # Lightning takes seconds

            cli = TrainerCLI(given)
            command = cli.subcommand or ""
            cli.run()
        except KeyboardInterrupt:
            _leave(130, _interrupted(cli, command))
        except SystemExit as end:
            if cli is None:
                raise  # of the parser
            _leave(130 if cli.trainer.interrupted else end.code, _interrupted(cli, command))
        except Exception as error:
            stop(error, command, debug, cli.end_ranks if cli else lambda: None)


def _interrupted(cli: TrainerCLI | None, command: str) -> str:
    """What is left, and how to go on."""
    if cli is None or command != "fit":
        return f"Interrupted. {remedy(command)}".strip()
    if not (cli.checkpoints / "last.ckpt").exists():
        return "Interrupted before the first checkpoint."
    return f"Interrupted; {described(cli.folder)}. {remedy(command)}"


def _leave(code: Any, message: str) -> None:
    """At once: Python's own end would wait for threads that wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if rank() in (0, None):
        STDERR.write(f"{message}\n")
    os._exit(code if isinstance(code, int) else 1)


def _ignore_advice() -> None:
    """Lightning's greetings, and advice that does not apply, as to take DataLoader workers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*sync_dist=True.*when logging on epoch level.*",
        ".*WeightAveraging callback with a model that overrides the configure_model.*",
        ".*smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation
        ".*callbacks used to create the checkpoint need to be provided.*",  # to validate, they need not
        ".*could not find the monitored key.*",  # training ends before the first validation
        ".*The dirpath has changed from.*",  # the run was moved
        ".*treespec, LeafSpec.*",  # of Lightning itself, with this torch
    ):
        warnings.filterwarnings("ignore", text)
