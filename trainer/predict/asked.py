"""The forecasts that are asked for, and what of them is there: found by the first rank, and told to the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardio import Dataset, Partition, begun_chunk_cells, sweep_published
from shardio.errors import DatasetError, OutputError
from trainer.predict.forecast import forecast_partition
from trainer.predict.predict import Task, path_of, plan
from trainer.predict.trained import Trained, check_variables


@dataclass(frozen=True)
class Found:
    """What the first rank sees.

    Attributes: checkpoint: digest of its file; chunk_cells: of the forecasts that are begun, None without; missing:
      places of the dates whose forecasts are to be written.
    """

    checkpoint: str
    chunk_cells: int | None
    missing: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Asked:
    """Forecasts from several dates.

    Attributes:
      trained, dataset: the model, and where it starts from.
      dates: initial ones.
      ranks: that together make one forecast.
      folder: of the forecasts.
      overwrite: replace what is there.
      wishes: further arguments of `plan`: lead_time, variables, members, config, precision.
    """

    trained: Trained
    dataset: Dataset
    dates: list[np.datetime64]
    ranks: int
    folder: Path
    overwrite: bool
    wishes: dict[str, Any]

    def plan(self, chunk_cells: int | None) -> tuple[Partition, list[Task]]:
        """Who owns which cells, and a task for each date; the same on all ranks."""
        cells = forecast_partition(self.dataset, self.ranks, chunk_cells)
        return cells, [plan(self.trained, self.dataset, cells, one, self.folder, **self.wishes) for one in self.dates]

    def find(self) -> Found:
        """What is there already. The folder is made.

        Raises: OutputError if it cannot be, or holds another forecast under the name of one of these; DatasetError or
          SelectionError where the dataset or the model lacks what one of them takes.
        """
        check_variables(self.trained, self.dataset)
        paths = [path_of(self.folder, date) for date in self.dates]
        for path in paths:
            sweep_published(path)
        begun = [size for path in paths if (size := begun_chunk_cells(path)) is not None]
        chunk_cells = None if self.overwrite else max(begun, default=None)
        _, tasks = self.plan(chunk_cells)
        missing = tuple(place for place, task in enumerate(tasks) if self.overwrite or not task.is_complete)
        self._prepare([paths[place] for place in missing])
        return Found(self.trained.digest, chunk_cells, missing)

    def refuse_other_checkpoint(self, found: Found) -> None:
        """DatasetError where this rank has read another file than the first one."""
        if found.checkpoint != self.trained.digest:
            raise DatasetError(
                f"the checkpoint is another file to this rank, {self.trained.digest}, than to the first, "
                f"{found.checkpoint}. Wait until no training replaces it, or give the path of a copy."
            )

    def _prepare(self, missing: list[Path]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the folder {self.folder} cannot be made: {error}. Choose another with --output."
            ) from error
        other = [path for path in missing if path.exists()]
        if other and not self.overwrite:
            raise OutputError(
                f"{other[0]} is another forecast, of another checkpoint, lead time, precision, dataset or other "
                "variables. Use --overwrite to replace it, or choose another folder with --output."
            )
