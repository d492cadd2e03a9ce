"""`trainer fit | validate`: every knob is in the YAML or a flag, and what cannot work fails before a rank starts."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import shardio
from shardio.allocator import keep_freed_memory
from shardio.errors import ShardioError
from trainer.curves import SKILL, LossCurve
from trainer.data import ForecastDataModule
from trainer.module import ForecastModule
from trainer.preflight import check
from trainer.strategy import DDPGroupStrategy

DESCRIPTION = """Train forecast models that never see the full grid.

trainer fit --config trainer/configs/demo.yaml
trainer fit --config my.yaml --trainer.devices 4 --strategy.num_gpus_per_model 4
trainer fit --config my.yaml --ckpt_path last          # go on where it stopped
trainer validate --config my.yaml --ckpt_path run/checkpoints/best.ckpt
"""


class TrainerCLI(LightningCLI):
    """LightningCLI with the strategy, the run's folder and its checkpoints as knobs of their own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning's that mean something here."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(DDPGroupStrategy, "strategy")
        parser.add_argument("--output", type=str, default="run", help="Folder of the run: checkpoints, logs, pictures.")
        parser.add_argument("--save_every", type=int, default=500, help="Steps between checkpoints.")
        parser.add_argument("--tensorboard", type=bool, default=False, help="Log for TensorBoard too.")
        parser.add_argument(
            "--ema_decay", type=float | None, default=None, help="Validate and keep averaged weights, such as 0.999."
        )
        parser.add_argument("--debug", type=bool, default=False, help="Show the traceback of an error.")
        parser.set_defaults(
            {
                "trainer.accelerator": "cpu",
                "trainer.devices": 1,
                "trainer.log_every_n_steps": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With our strategy, loggers and checkpoints; under torchrun with as many processes as it started."""
        output = self._option("output")
        loggers: list[Any] = [CSVLogger(output, name="logs")]
        if self._option("tensorboard"):
            loggers.append(TensorBoardLogger(output, name="tensorboard"))
        settings: dict[str, Any] = {"logger": loggers, "strategy": self._get(self.config_init, "strategy")}
        if "LOCAL_WORLD_SIZE" in os.environ:
            settings["devices"] = int(os.environ["LOCAL_WORLD_SIZE"])
            settings["num_nodes"] = int(os.environ["WORLD_SIZE"]) // settings["devices"]
        settings["callbacks"] = [*(self._get(self.config_init, "trainer.callbacks") or []), *self._callbacks(output)]
        trainer: Trainer = super().instantiate_trainer(**settings)
        return trainer

    def _callbacks(self, output: str) -> list[Any]:
        folder = os.path.join(output, "checkpoints")
        same_name = {"dirpath": folder, "enable_version_counter": False, "save_top_k": 1}
        callbacks: list[Any] = [
            LearningRateMonitor("step"),
            LossCurve(output),
            ModelCheckpoint(filename="last", every_n_train_steps=self._option("save_every"), **same_name),
            ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **same_name),
        ]
        if self.datamodule.has_validation:
            callbacks.append(ModelCheckpoint(filename="best", monitor=SKILL, **same_name))
        if self._option("ema_decay") is not None:
            callbacks.append(EMAWeightAveraging(decay=self._option("ema_decay")))
        return callbacks

    def before_fit(self) -> None:
        """Runs in every process, in the first one before it starts the others."""
        check(self.trainer, self.model, self.datamodule)

    before_validate = before_fit

    def _option(self, name: str) -> Any:
        return self._get(self.config, name)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `trainer`."""
    keep_freed_memory()
    try:
        _run(arguments)
    except ShardioError as error:
        _stop(str(error))
    except RuntimeError as error:
        if not _lost_a_rank(error):
            raise
        _stop(
            "stopped, because another rank stopped: its message is above; without one it was killed, often by lack "
            "of memory."
        )


def _run(arguments: list[str] | None) -> None:
    with warnings.catch_warnings():
        _ignore_advice()
        TrainerCLI(
            ForecastModule,
            ForecastDataModule,
            args=arguments,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"description": DESCRIPTION, "version": shardio.__version__},
        )


def _ignore_advice() -> None:
    """Lightning's advice that does not apply: we have no DataLoader workers, and metrics are global already."""
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*sync_dist=True.*when logging on epoch level.*",
    ):
        warnings.filterwarnings("ignore", text)


def _lost_a_rank(error: RuntimeError) -> bool:
    text = str(error)
    return any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL"))


def _stop(message: str) -> None:
    """One message per rank; then leave at once, so that nobody waits for a rank that will not come."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
    where = f"rank {rank}: " if rank is not None else ""
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(f"Error: {where}{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
