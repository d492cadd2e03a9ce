"""trainer: forecast models on sharded fields; what every rank computes never depends on how the grid was cut."""

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    # Names are fetched when first used: `import trainer` itself costs no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"trainer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
