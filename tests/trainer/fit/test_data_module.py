"""The data module: every way to load gives the same training, and nothing of it stays behind."""

from pathlib import Path

import pytest
from datasets import write_dataset
from runs import Run, checkpoint, fit, tiny, trace, waves

from shardio.errors import DatasetError
from shardio.write.job import Job
from trainer.fit.data import ForecastDataModule

TWO = ["--strategy.num_gpus_per_model=2", "--trainer.max_steps=6", "--data.val_start=2020-01-06"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("sharded"), *tiny(*TWO), ranks=2)


@pytest.mark.parametrize(
    "way",
    [
        ["--data.keep_batch_sharded=false"],
        ["--strategy.read_group_size=1"],
        ["--strategy.read_group_size=1", "--data.keep_batch_sharded=false", "--data.prefetch=1", "--data.verify=true"],
    ],
)
def test_every_way_to_load_gives_the_same_training_bit_by_bit(sharded, tmp_path, way):
    run = fit(tmp_path, *tiny(*TWO, *way), ranks=2)
    assert trace(run.output) == trace(sharded.output)
    one, other = checkpoint(run.output)["state_dict"], checkpoint(sharded.output)["state_dict"]
    assert all(one[name].equal(other[name]) for name in other)


PROGRAM = f"""
import threading
from lightning.pytorch import Trainer
from trainer import DDPGroupStrategy, ForecastDataModule, ForecastModule
from trainer.graph.graph import GraphOptions
from trainer.model.model import ModelOptions

data = ForecastDataModule({str(waves())!r}, val_start="2020-01-06")
module = ForecastModule(["lsm"], graph=GraphOptions("ico1"), network=ModelOptions(8, 1, 2))
options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
options |= dict(devices=1, num_sanity_val_steps=0, max_steps=4)
for _ in range(2):
    trainer = Trainer(strategy=STRATEGY, **options)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
print([thread.name for thread in threading.enumerate() if "shardio" in thread.name])
print(module.scores.leads, module.scores.variables)
"""


def test_reading_threads_end_with_the_training_of_a_program(tmp_path):
    run = Run(tmp_path, "-c", PROGRAM.replace("STRATEGY", "DDPGroupStrategy()"))
    assert run.wait() == [0], run.errors
    assert run.printed.endswith("[]\n('6h',) ('psi', 'vo', 'u', 'v', 't', 'latitude')\n")


GROWING = """
from pathlib import Path
from lightning.pytorch import Callback, Trainer
from trainer import DDPGroupStrategy, ForecastDataModule, ForecastModule
from trainer.graph.graph import GraphOptions
from trainer.model.model import ModelOptions
from trainer.fit.module import RolloutOptions

class Reads(Callback):
    def now(self):
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    def on_train_epoch_start(self, trainer, module):
        self.before, self.dates = self.now(), set()

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.dates.add(batch.fields.shape[1])

    def on_train_epoch_end(self, trainer, module):
        print(*self.dates, self.now() - self.before, trainer.num_training_batches)

data = ForecastDataModule("many.zarr", drop=["sst"], prefetch=1)
network, rollout = ModelOptions(8, 1, 2), RolloutOptions(1, 3)
module = ForecastModule(["lsm"], graph=GraphOptions("ico1"), network=network, rollout=rollout)
options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
options |= dict(enable_model_summary=False)
Trainer(strategy=DDPGroupStrategy(), devices=1, max_epochs=4, callbacks=[Reads()], **options).fit(module, data)
"""


def test_an_epoch_reads_only_the_dates_of_its_rollout(tmp_path):
    write_dataset(tmp_path / "many.zarr", "octahedral", dates=200)  # so many that few are still in memory
    run = Run(tmp_path, "-c", GROWING)
    assert run.wait() == [0], run.errors
    epochs = [[int(number) for number in line.split()] for line in run.printed.splitlines()]
    assert [dates for dates, _, _ in epochs] == [2, 3, 4, 4]
    assert {batches for _, _, batches in epochs} == {200 - 3}, "epochs are equally long"
    whole = epochs[-1][1]
    assert [nbytes / whole for _, nbytes, _ in epochs] == pytest.approx([2 / 4, 3 / 4, 1, 1], rel=0.1)


def test_a_dataset_in_the_making_is_told_with_the_command_that_finishes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "shardio rechunk source.zarr m.zarr --grid-chunks 4"
    Job(Path("m.zarr"), {"dates": 3}, command, True).close()
    with pytest.raises(DatasetError, match="is incomplete: 0 of 3 dates are written") as told:
        _ = ForecastDataModule("m.zarr").dataset
    assert str(told.value).endswith(f"Finish it with: {command}")
    with pytest.raises(DatasetError, match=f"other.zarr does not exist.* It would be {tmp_path}/other.zarr. Paths are"):
        _ = ForecastDataModule("other.zarr").dataset


def test_another_strategy_is_refused(tmp_path):
    run = Run(tmp_path, "-c", PROGRAM.replace("STRATEGY", "'auto'"))
    assert run.wait() == [1]
    assert "needs a Trainer with strategy=DDPGroupStrategy(...)" in run.errors
