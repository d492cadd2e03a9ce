"""Flags are taken with hyphens or underscores; their values are left as they are."""

from trainer.flags import underscored


def test_hyphens_are_taken_for_underscores_in_names_only() -> None:
    given = ["--lead-time=24h", "--ckpt-path", "my-run/last.ckpt", "--output=to-day", "--model.graph-cache=a-b=c", "-c"]
    expected = [
        *("--lead_time=24h", "--ckpt_path", "my-run/last.ckpt", "--output=to-day", "--model.graph_cache=a-b=c", "-c"),
    ]
    assert underscored(given) == expected
