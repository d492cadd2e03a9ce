"""trainer: forecast models on sharded fields; what every rank computes never depends on how the grid was cut."""

from typing import TYPE_CHECKING

from shardio.lazy import fetch_from

if TYPE_CHECKING:  # what __getattr__ gives at run time, for type checkers and editors
    from trainer.fit.data import ForecastDataModule
    from trainer.fit.module import ForecastModule
    from trainer.fit.strategy import DDPGroupStrategy
    from trainer.predict.forecast import load

__all__ = ["DDPGroupStrategy", "ForecastDataModule", "ForecastModule", "load"]

_HOMES = {
    "DDPGroupStrategy": "fit.strategy",
    "ForecastDataModule": "fit.data",
    "ForecastModule": "fit.module",
    "load": "predict.forecast",
}

__getattr__ = fetch_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
