"""The command `trainer`. Its help is at hand at once: torch and Lightning are imported by a command that runs."""

from __future__ import annotations

import sys

DESCRIPTION = """Train forecast models that never see the full grid.

  trainer fit --config demo
  trainer validate --config demo --ckpt_path last
  trainer predict --config demo --ckpt_path last --start 2020-02-10
  trainer plan --config demo --gpus-per-model 1,2,4

commands:
  fit        train, and write checkpoints, logs and curves.png
  validate   forecast the validation dates, and compare with persistence
  predict    forecasts from a checkpoint; every rank writes its own part
  plan       memory and messages of each rank, before GPUs are booked
  export     the model as one program, for production

Every knob is in the YAML and a flag of the same name; flags win. trainer fit --help lists them all,
trainer fit --print_config writes a YAML with all of them. trainer COMMAND --help has examples."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `trainer`."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: trainer COMMAND [--OPTION VALUE ...]\n\n{DESCRIPTION}")
        return
    from shardio import keep_freed_memory
    from trainer.cli.command import execute
    from trainer.cli.configs import by_name

    keep_freed_memory()
    execute(by_name(given))
