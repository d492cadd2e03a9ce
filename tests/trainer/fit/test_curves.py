"""The log of losses and its picture, over interrupted runs too."""

from matplotlib.figure import Figure
from runs import fit, tiny, trace

from trainer.fit.curves import SKILL, TRAINING, draw, read


def write(folder, version, rows):
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([f"step,{TRAINING},{SKILL}", *rows]))


def test_a_resumed_run_is_read_after_the_one_before(tmp_path):
    write(tmp_path, 9, ["1,4.0,", "2,3.0,", "2,,0.9"])
    write(tmp_path, 10, ["2,2.5,", "3,2.0,"])
    assert read(tmp_path, TRAINING) == {1: 4.0, 2: 2.5, 3: 2.0}
    assert read(tmp_path, SKILL) == {2: 0.9}


def test_the_picture_is_drawn_with_and_without_validation(tmp_path):
    assert draw(tmp_path) is None
    write(tmp_path, 0, ["1,4.0,", "2,3.0,"])
    assert draw(tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_the_steps_of_a_short_run_are_whole_numbers(tmp_path, monkeypatch):
    write(tmp_path, 0, ["1,4.0,", "2,3.0,", "3,2.0,"])
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw(tmp_path)
    low, high = drawn[0].axes[0].get_xlim()
    ticks = [tick for tick in drawn[0].axes[0].get_xticks() if low <= tick <= high]
    assert ticks == [1, 2, 3]


def test_the_loss_of_a_step_is_the_mean_of_its_batches_however_they_come(tmp_path):
    common = tiny("--trainer.max_steps=5", "--trainer.precision=64-true", "--output")
    cuts = {
        "whole": ("1", ["--data.batch_size=4"]),
        "parts": ("1", ["--trainer.accumulate_grad_batches=4"]),
        "groups": ("2", ["--data.batch_size=2"]),
    }
    traces = {}
    for name, (ranks, more) in cuts.items():
        fit(tmp_path, *common, name, *more, ranks=int(ranks))
        traces[name] = [round(float(loss), 12) for loss in trace(tmp_path / name).values()]
    assert len(traces["whole"]) == 5
    assert traces["whole"] == traces["parts"] == traces["groups"]
