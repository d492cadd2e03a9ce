"""Flags are taken with hyphens or underscores; their values are left as they are."""

from trainer.cli.flags import meant, settings, underscored


def test_hyphens_are_taken_for_underscores_in_names_only() -> None:
    given = ["--lead-time=24h", "--ckpt-path", "my-run/last.ckpt", "--output=to-day", "--model.graph-cache=a-b=c", "-c"]
    expected = [
        *("--lead_time=24h", "--ckpt_path", "my-run/last.ckpt", "--output=to-day", "--model.graph_cache=a-b=c", "-c"),
    ]
    assert underscored(given) == expected


def test_what_is_no_option_is_found_and_the_nearest_named() -> None:
    names = {"model.network.channels", "model.loss.variable_weights", "model.forcings"}
    about = {"model": {"network": {"chanels": 3}, "loss": {"variable_weights": {"t": 2.0}}, "forcings": None}, "x": 1}
    expected = [("model.network.chanels", 3), ("model.loss.variable_weights", {"t": 2.0}), ("model.forcings", None)]
    assert list(settings(about, names)) == [*expected, ("x", 1)]
    assert meant("model.network.chanels", names) == " Did you mean model.network.channels?"
    assert meant("x", names) == ""
