"""`trainer fit | validate`: every knob is in the YAML or a flag, and what cannot work fails before a rank starts."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import shardio
from shardio.errors import DatasetError, PlanError
from trainer.cli.flags import (
    Brief,
    Formatter,
    configurations,
    read_configuration,
    refuse_typos,
    refuse_typos_of,
    underscored,
)
from trainer.cli.main import DESCRIPTION
from trainer.cli.report import Trained, Validated, show
from trainer.comm import join_world
from trainer.fit.checkpoint import KeepLast
from trainer.fit.curves import SKILL, LossCurve
from trainer.fit.data import ForecastDataModule
from trainer.fit.module import ForecastModule
from trainer.fit.preflight import check
from trainer.fit.progress import Bar
from trainer.fit.run_folder import CHECKPOINTS, RUN, Replace, claim, refuse_existing
from trainer.fit.strategy import DDPGroupStrategy
from trainer.model.saved import step_of
from trainer.ranks.agree import Finding, hear, look
from trainer.ranks.launcher import started_by_others

FIT = """Train, and write checkpoints, logs and curves.png to the folder --output.

  trainer fit --config demo
  trainer fit --config my.yaml --trainer.devices 4 --strategy.num_gpus_per_model 4
  trainer fit --config my.yaml --ckpt_path last                go on where it stopped, on any number of ranks
  torchrun --nproc_per_node 4 -m trainer.cli fit --config my.yaml --strategy.num_gpus_per_model 4

Ranks: --trainer.devices x --trainer.num_nodes of them, or as many as torchrun or SLURM start. Each
--strategy.num_gpus_per_model together hold one model; the others train it on other dates."""

SEEDS = 2**32  # there are so many

VALIDATE = """Forecast the validation dates, and compare with persistence, the forecast that nothing changes.

  trainer validate --config my.yaml --ckpt_path last
  trainer validate --config my.yaml --ckpt_path run/checkpoints/best.ckpt --data.val_start 2021 --json

Prints root mean square errors in the units of the dataset, weighted by area, by variable and lead time."""


@dataclass(frozen=True)
class Start:
    """Attributes: checkpoint: to load, if any; goes_on: whether with the run that is in the folder."""

    checkpoint: str | None
    goes_on: bool


class Parser(Brief, LightningArgumentParser):
    """Of Lightning's commands."""


class TrainerCLI(LightningCLI):
    """LightningCLI with the strategy, the run's folder and its checkpoints as knobs of their own."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            ForecastModule,
            ForecastDataModule,
            args=arguments,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={
                "prog": "trainer",
                "description": DESCRIPTION,
                "version": f"trainer {shardio.__version__}",
                "formatter_class": Formatter,
                **{
                    name: {
                        "description": description,
                        "usage": f"trainer {name} --config FILE [--OPTION VALUE ...]",
                        "formatter_class": Formatter,
                    }
                    for name, description in (("fit", FIT), ("validate", VALIDATE))
                },
            },
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The words of the command, once they and the configurations that they name are known to be options."""
        words = underscored(args)
        if own := self._subcommand_parsers.get(words[0]):
            refuse_typos(own, words[1:])
            for path in configurations(words):
                refuse_typos_of(own, path, read_configuration(path))
        super().parse_arguments(parser, words)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning's that mean something here."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(DDPGroupStrategy, "strategy")
        parser.add_argument("--output", type=str, default=RUN, help="Folder of the run: checkpoints, logs, pictures.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the run that is in --output.")
        parser.add_argument("--save_every", type=int, default=500, help="Steps between checkpoints.")
        parser.add_argument("--tensorboard", type=bool, default=False, help="Log for TensorBoard too.")
        parser.add_argument(
            "--ema_decay", type=float | None, default=None, help="Validate and keep averaged weights, such as 0.999."
        )
        parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
        parser.add_argument("--debug", action="store_true", help="Show all of Lightning's messages, and tracebacks.")
        parser.set_defaults(
            {
                "trainer.accelerator": "cpu",
                "trainer.devices": 1,
                "trainer.log_every_n_steps": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )

    def _set_seed(self) -> None:
        """Lightning would draw another seed in the place of one that is out of range, and go on."""
        seed = self.option("seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < SEEDS:
            raise PlanError(f"seed_everything is {seed}. Use 0 to {SEEDS - 1}.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        if self.option("data.seed") is None:  # one seed for weights and the order of samples
            self.config[self.subcommand].data.seed = int(self.option("seed_everything"))
        if self.subcommand == "validate":
            self.save_config_callback = None
            return
        # Not for the YAML that the run keeps: who trains with it again has not asked to replace anything.
        self._overwrite = bool(self.option("overwrite"))
        self.config[self.subcommand].overwrite = False

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the checkpoint for options of the model: it holds none, and may not be one."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With our strategy, loggers and checkpoints; under torchrun or SLURM with as many processes as they start."""
        if self.option("trainer.strategy") != "auto":
            raise PlanError("trainer.strategy is always DDPGroupStrategy. Set --strategy.num_gpus_per_model instead.")
        settings: dict[str, Any] = {"strategy": self._get(self.config_init, "strategy"), **started_by_others()}
        if self.subcommand == "fit":
            settings |= {"logger": [*self._loggers(), *self._asked_loggers()], "callbacks": self._callbacks()}
        else:
            settings |= {"logger": False, "enable_checkpointing": False}
        trainer: Trainer = super().instantiate_trainer(**settings)
        return trainer

    def _loggers(self) -> list[Any]:
        loggers: list[Any] = [CSVLogger(self.option("output"), name="logs", flush_logs_every_n_steps=1)]
        if self.option("tensorboard"):
            if not (find_spec("tensorboard") or find_spec("tensorboardX")):
                raise PlanError(
                    "--tensorboard needs a package that is not installed. Run pip install tensorboard, or leave it "
                    "out: the log is in logs/version_*/metrics.csv anyway."
                )
            loggers.append(TensorBoardLogger(self.option("output"), name="tensorboard"))
        return loggers

    def _asked_loggers(self) -> list[Any]:
        """Those of trainer.logger, beside our own, from which curves.png is drawn."""
        asked = self._get(self.config_init, "trainer.logger")
        if asked is None or isinstance(asked, bool):
            return []
        return list(asked) if isinstance(asked, list | tuple) else [asked]

    def _callbacks(self) -> list[Any]:
        callbacks = [*(self._get(self.config_init, "trainer.callbacks") or []), LossCurve(self.option("output"))]
        if self.option("ema_decay") is not None:
            callbacks.append(EMAWeightAveraging(use_buffers=False, decay=self.option("ema_decay")))
        if self.datamodule.has_validation:
            callbacks.append(
                ModelCheckpoint(
                    self.checkpoints, filename="best", monitor=SKILL, save_top_k=1, enable_version_counter=False
                )
            )
        own = any(isinstance(one, ProgressBar) for one in callbacks)
        if self.option("trainer.enable_progress_bar") is not False and not own:
            callbacks.append(Bar())
        return [*callbacks, KeepLast(self.checkpoints, self.option("save_every"))]

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.folder / CHECKPOINTS

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.option("output"))

    def option(self, name: str) -> Any:
        """As given in the YAML or as a flag."""
        return self._get(self.config, name)

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning runs it while this object is made; we want the object to tell of a failure: see `run`."""

    def run(self) -> None:
        """Fit or validate; the result goes to stdout, all else to stderr."""
        with ExitStack() as held:
            finding = look(lambda: self._find(held))
            launcher: Any = self.trainer.strategy.launcher
            launcher.launch(self._run_as_rank, finding, trainer=self.trainer)

    def _find(self, held: ExitStack) -> Start:
        """Where it starts, and that it can; the folder of the run is held until it ends."""
        path = self._checkpoint_path()
        check(self.trainer, self.model, self.datamodule)
        if self.subcommand == "validate":
            return Start(path, False)
        held.enter_context(claim(self.folder))
        return Start(path, refuse_existing(self.folder, path, self._overwrite))

    def _run_as_rank(self, finding: Finding[Start]) -> None:
        assert self.subcommand is not None
        options, began = self._prepare_subcommand_kwargs(self.subcommand), time.monotonic()
        with redirect_stdout(sys.stderr):
            self.trainer.strategy.setup_environment()
            start = hear(finding, join_world())
            if self.subcommand == "validate":
                options["verbose"] = False  # we print the scores ourselves
            elif not start.goes_on:
                callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
                callbacks.insert(0, Replace(self.folder))  # before those that write checkpoints
            getattr(self.trainer, self.subcommand)(**options | {"ckpt_path": start.checkpoint})
        if self.trainer.is_global_zero:
            show(self._outcome(time.monotonic() - began), self.option("json"))

    def _outcome(self, seconds: float) -> Trained | Validated:
        if self.subcommand == "validate":
            dates = self.datamodule.validation.dates
            return Validated(str(dates[0]), str(dates[-1]), self.model.scores)
        ratio = self.trainer.callback_metrics.get(SKILL)
        return Trained(self.folder, self.trainer.global_step, seconds, None if ratio is None else float(ratio))

    def _checkpoint_path(self) -> str | None:
        """`last` and `best` are those of the run; to go on with `last` where none is yet means to begin."""
        path: str | None = self.option("ckpt_path")
        if path is None and self.subcommand == "validate":
            raise DatasetError(
                "no checkpoint is named, and an untrained model has no scores. Give --ckpt_path last, best, or the "
                "path of a .ckpt file."
            )
        if path in ("last", "best"):
            path = str(self.checkpoints / f"{path}.ckpt")
            if self.subcommand == "fit" and path.endswith("last.ckpt") and not Path(path).exists():
                print(f"there is no {path} yet: training begins", file=sys.stderr)
                return None
        if path is not None and not Path(path).exists():
            raise DatasetError(f"there is no checkpoint {path}. Give the path of a .ckpt file, or: last, best.")
        if path is not None:
            step_of(path)  # says what is none
        return path

    def end_ranks(self) -> None:
        """End the ranks that this process started."""
        launcher: Any = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
