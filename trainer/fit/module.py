"""`ForecastModule`: what Lightning trains. The numbers are made elsewhere; here they are put in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

import shardio
from shardio.dates import format_step
from shardio.errors import DatasetError, PlanError
from trainer.fit.curves import SKILL
from trainer.fit.data import Batch, ForecastDataModule
from trainer.fit.health import check_input, explain_divergence
from trainer.fit.metrics import ErrorSums, Scores
from trainer.fit.optimizer import OptimizerOptions, build_optimizer, follow_batch, split_groups
from trainer.graph.graph import GraphOptions
from trainer.model.assembly import (
    assemble_areas,
    assemble_forecaster,
    assemble_graph,
    assemble_loss,
)
from trainer.model.forecaster import Forecaster, Roles
from trainer.model.loss import LossOptions
from trainer.model.model import ModelOptions
from trainer.ranks.failure import say
from trainer.share import Share
from trainer.step import forecast_loss


@dataclass(frozen=True)
class RolloutOptions:
    """How many steps the loss looks ahead.

    Attributes:
      start: steps in the first epoch.
      maximum: steps in the end.
      epochs_per_increment: epochs after which one more step is added.
    """

    start: int = 1
    maximum: int = 1
    epochs_per_increment: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.maximum or self.epochs_per_increment < 1:
            raise PlanError(
                f"rollout from {self.start} to {self.maximum} steps, one more every {self.epochs_per_increment} epochs "
                "is not possible. Use 1 <= start <= maximum, and epochs_per_increment of 1 or more."
            )

    def steps(self, epoch: int) -> int:
        """In this epoch."""
        return min(self.start + epoch // self.epochs_per_increment, self.maximum)


class ForecastModule(LightningModule):
    """An encoder-processor-decoder forecast model on sharded fields.

    Args:
      forcings: variables given to the model at all times, not forecast.
      diagnostics: variables forecast, not given to the model.
      allow_nan: variables that may be NaN: not counted in the loss, and the mean for the model; a prognostic one that
        is NaN at the last input time stays so. NaN in any other variable stops the training.
      graph: hidden mesh and edges.
      network: size of the model.
      loss: how errors are weighed.
      optimizer: AdamW and its learning rate.
      rollout: steps that the loss looks ahead.
      validation_steps: steps that validation looks ahead.
      graph_cache: folder that keeps built graphs; none by default.
    """

    def __init__(
        self,
        forcings: list[str] | None = None,
        diagnostics: list[str] | None = None,
        allow_nan: list[str] | None = None,
        graph: GraphOptions = GraphOptions(),
        network: ModelOptions = ModelOptions(),
        loss: LossOptions = LossOptions(),
        optimizer: OptimizerOptions = OptimizerOptions(),
        rollout: RolloutOptions = RolloutOptions(),
        validation_steps: int = 1,
        graph_cache: str | None = None,
    ):
        super().__init__()
        self.forcings, self.diagnostics = tuple(forcings or ()), tuple(diagnostics or ())
        self.allow_nan = tuple(allow_nan or ())
        self.graph_options, self.network_options, self.loss_options = graph, network, loss
        self.optimizer_options, self.rollout, self.validation_steps = optimizer, rollout, validation_steps
        self.graph_cache = graph_cache
        self.forecaster: Forecaster | None = None

    # -------------------------------------------------------------------------------------------------------- set-up
    @property
    def data(self) -> ForecastDataModule:
        """The data module that this module is trained with."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ForecastDataModule)
        return data

    @property
    def share(self) -> Share:
        """What this rank has of the work."""
        return self.data.share

    def roles(self) -> Roles:
        """Of the dataset's variables."""
        return Roles(self.data.dataset.variables, self.forcings, self.diagnostics, self.allow_nan)

    def configure_model(self) -> None:
        """Build this rank's part of the graph, and the model on it: now the ranks know one another."""
        if self.forecaster is not None:
            return
        # Averaging of weights calls this outside of the first context. Lightning builds on the device of the rank: from
        # the same seed its generator draws other weights than that of the CPU.
        with self.trainer.precision_plugin.module_init_context(), torch.device("cpu"):
            self._build()

    def _build(self) -> None:
        dataset, share, network = self.data.dataset, self.share, self.network_options
        say("building the graph")
        graph = assemble_graph(dataset, share, self.graph_options, network, self.graph_cache)
        self.forecaster = assemble_forecaster(dataset, share, self.roles(), self.data.input_steps, network, graph)
        self.areas = assemble_areas(dataset, share)
        self.loss = assemble_loss(dataset, self.forecaster, self.areas, self.loss_options, share)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return build_optimizer(self.parameters(), self.optimizer_options, self.effective_batch, steps)

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer step, of all ranks."""
        return self.data.samples_per_step * self.trainer.accumulate_grad_batches

    # --------------------------------------------------------------------------------------------------------- steps
    def on_train_epoch_start(self) -> None:
        self.data.begin_epoch(self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the rollout: the same value on all ranks of the model group, the gradient of own cells."""
        assert self.forecaster is not None
        steps = self.rollout.steps(self.current_epoch)
        self._check_input(batch, steps)
        loss = forecast_loss(self.forecaster, self.loss, batch.fields, steps)
        if not torch.isfinite(loss.value):
            dates = batch.dates[:, self.forecaster.input_steps :]
            explain_divergence(loss.leads, dates, self.forecaster.roles.outputs, self.global_step)
        self.log("train/loss", loss.value.detach(), prog_bar=True, logger=False, batch_size=len(batch.fields))
        return loss.value

    def _check_input(self, batch: Batch, steps: int) -> None:
        assert self.forecaster is not None
        inputs, roles = self.forecaster.input_steps, self.forecaster.roles
        check_input(batch.fields[:, : inputs + steps], batch.dates, inputs, roles, self.global_step)

    def on_validation_epoch_start(self) -> None:
        shape = self.validation_steps, len(self.roles().outputs)
        self._errors, self._persistence = (ErrorSums(self.areas, shape, self.data.strategy.world) for _ in range(2))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.forecaster is not None
        self._check_input(batch, self.validation_steps)
        model, counted = self.forecaster, torch.from_numpy(~batch.padding).to(batch.fields.device)
        fields = model.normalise(batch.fields)
        outputs = model.roles.places(model.roles.outputs)
        now = fields[:, model.input_steps - 1][..., outputs]
        for lead, (prediction, target) in enumerate(model.rollout(fields, self.validation_steps)):
            known = counted[:, None, None, None] & torch.isfinite(target)
            self._errors.add(lead, (prediction - target) * model.stdev[outputs], known)
            self._persistence.add(lead, (now - target) * model.stdev[outputs], known & torch.isfinite(now))

    def on_validation_epoch_end(self) -> None:
        assert self.forecaster is not None
        step = self.data.dataset.step
        assert step is not None
        leads = tuple(format_step((lead + 1) * step) for lead in range(self.validation_steps))
        errors, persistence = self._errors.root_mean_square(), self._persistence.root_mean_square()
        names = self.forecaster.roles.outputs
        about = self.data.dataset.variables_metadata(names)
        units = tuple(str(about.get(name, {}).get("units", "")) for name in names)
        self.scores = Scores(leads, names, units, errors.cpu().numpy(), persistence.cpu().numpy())
        prognostic = slice(len(self.forecaster.roles.prognostic))
        changing = persistence[:, prognostic] > 0.0  # false where nothing was counted
        skill = (errors / persistence)[:, prognostic][changing].mean()
        # Sums over all ranks went into these: every rank logs the same.
        self.log_dict({f"val/{name}": value for name, value in self.scores.flat().items()}, sync_dist=False)
        self.log(SKILL, skill, prog_bar=True, sync_dist=False)

    # -------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a forecast needs to know beyond the weights, and what a resumed run needs: plain values only."""
        checkpoint["shardio"] = self._about()
        checkpoint["random"] = torch.get_rng_state()
        checkpoint["samples_per_step"] = self.data.samples_per_step
        checkpoint["effective_batch"] = self.effective_batch

    def _about(self) -> dict[str, Any]:
        dataset, roles = self.data.dataset, self.roles()
        return {
            "version": shardio.__version__,
            "variables": list(roles.variables),
            "forcings": list(self.forcings),
            "diagnostics": list(self.diagnostics),
            "allow_nan": list(self.allow_nan),
            "input_steps": self.data.input_steps,
            "precision": self.trainer.precision,
            "step_seconds": dataset.step,
            "graph": asdict(self.graph_options),
            "network": asdict(self.network_options),
            "grid": dataset.grid_digest,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of other variables; go on with the same random numbers, and at the same place in the data."""
        if "shardio" not in checkpoint:
            raise DatasetError("this checkpoint was not written by `trainer fit`. Give the path of one that was.")
        kept, now = _with_new_options(checkpoint["shardio"]), self._about()
        changed = [
            name
            for name in ("variables", "forcings", "diagnostics", "input_steps", "step_seconds", "graph", "grid")
            if name in kept and kept[name] != now[name]
        ]
        if changed:
            name = changed[0]
            raise DatasetError(
                f"the checkpoint was trained with {name} {kept[name]}, this run has {now[name]}: its weights would "
                "mean something else. Use the configuration and the grid that it was trained with."
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            torch.set_rng_state(checkpoint["random"].cpu())
            self._resume_data(checkpoint)
            split_groups(checkpoint, self.parameters())
            follow_batch(checkpoint, self.optimizer_options, checkpoint["effective_batch"], self.effective_batch)

    def _resume_data(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the same sample. Lightning ends an epoch by count: count the batches that this topology makes."""
        loop = checkpoint["loops"]["fit_loop"]
        (position,) = loop["state_dict"]["combined_loader"]
        self.data.resume(position)
        samples_per_step = self.data.samples_per_step
        if position["cursor"] == 0 or checkpoint["samples_per_step"] == samples_per_step:
            return
        left = (position["samples"] - position["cursor"]) // samples_per_step
        done = position["samples"] // samples_per_step - left
        progress = loop["epoch_loop.batch_progress"]
        progress["is_last_batch"] = left == 0  # what is left fills no batch here: the next epoch begins
        current = progress["current"]
        behind = current["ready"] - current["completed"]
        current.update(ready=done, started=done, processed=done, completed=done - behind)


def _with_new_options(about: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says, with the defaults of options that did not exist when it was written."""
    if "graph" not in about:
        return about
    return {**about, "graph": {**asdict(GraphOptions()), **about["graph"]}}
