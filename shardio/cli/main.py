"""The command line: shardio rechunk, info, verify, synth, plot. stdout is the result, stderr progress and errors."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from functools import partial
from typing import Any

import click

from shardio import __version__
from shardio.cli.parameters import ByteSize, Names, join_names
from shardio.errors import ShardioError

Json = dict[str, Any]


class Commands(click.Group):
    """Exit codes: 0 done, 1 failed with one message, 2 usage, 130 interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                if not ctx.params.get("debug"):
                    warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except ShardioError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"Error: {error}. Correct the cause, then run the same command again.", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted. What is written is kept: run the same command again to continue.", err=True)
            ctx.exit(130)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Ours are for the user, who is not helped by a line of code."""
    text = str(message) if category.__module__.startswith("shardio.") else f"{category.__name__}: {message}"
    click.echo(f"Warning: {text}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="shardio")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Weather datasets cut into grid-chunks, so that every rank reads only its cells.

    \b
    shardio synth waves.zarr --grid o96 --dates 40       make a dataset to try things on
    shardio rechunk era5.zarr era5-16.zarr --grid-chunks 16
    shardio info era5-16.zarr --ranks 4
    shardio verify era5-16.zarr --source era5.zarr

    \b
    Shell completion: eval "$(_SHARDIO_COMPLETE=bash_source shardio)"   (or zsh_source, fish_source)
    """


names_option = partial(click.option, type=Names(), multiple=True, callback=join_names)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@main.command()
@click.argument("source")
@click.argument("destination")
@click.option("--grid-chunks", "-n", type=int, required=True, help="Grid-chunks per date: a multiple of your ranks.")
@click.option(
    "--zarr-format", type=click.Choice(["2", "3"]), help="Default: that of the source; 3 where it is not Zarr."
)
@click.option("--codec", default="lz4", show_default=True, help="lz4 (fastest), zstd (smallest) or none.")
@click.option(
    "--order",
    type=click.Choice(["compact", "native"]),
    help="Order of the cells: compact, so that grid-chunks are regions with short borders, or native, as they were "
    "before that. Default: the order of the source, whichever it is.",
)
@click.option("--start", help="First date: 2020, 2020-03, 2020-03-01 or 2020-03-01T06:00.")
@click.option("--end", help="Last date, included: --end 2020 is all of 2020.")
@names_option("--select", help="Keep these variables, in this order: t_850,z_500.")
@names_option("--drop", help="Leave these variables out.")
@click.option("--workers", type=click.IntRange(min=1), help="Use so many local processes.")
@click.option("--scheduler", help="Use the workers of a dask cluster: tcp://host:8786.")
@click.option("--max-memory", type=ByteSize(), default="4GiB", show_default=True, help="Of all buffers together.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is complete.")
@click.option("--fill-missing-chunks", is_flag=True, help="Take chunks absent from the source as its fill value.")
@click.option("--fsync/--no-fsync", default=True, show_default=True, help="Survive power loss without redoing work.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option
def rechunk(source: str, destination: str, **options: Any) -> None:
    """Cut every date of SOURCE into grid-chunks, and write DESTINATION (a path that ends in .zarr).

    SOURCE is an anemoi dataset (Zarr v2 or v3), a NetCDF or GRIB file, a CF Zarr, or a quoted pattern of files.
    Run the same command again to continue after an interruption; once all is done it writes nothing.

    \b
    shardio rechunk era5.zarr era5-16.zarr --grid-chunks 16
    shardio rechunk era5.zarr era5-16.zarr -n 16 --order compact
    shardio rechunk era5.zarr sample.zarr -n 16 --start 2020 --end 2020-03 --select t_850,z_500
    shardio rechunk "era5-*.nc" era5.zarr -n 16 --codec zstd
    shardio rechunk era5.zarr era5-16.zarr -n 16 --scheduler tcp://10.0.0.1:8786
    """
    from shardio.cli.making import make
    from shardio.rechunk.request import Request
    from shardio.source.source import Selection

    if options["workers"] and options["scheduler"]:
        raise click.UsageError("--workers starts local processes, --scheduler uses a cluster: choose one.")
    zarr_format = int(options["zarr_format"]) if options["zarr_format"] else None
    request = Request(
        source=source,
        destination=destination,
        grid_chunks=options["grid_chunks"],
        zarr_format=zarr_format,
        codec=options["codec"],
        selection=Selection(options["start"], options["end"], options["select"], options["drop"]),
        max_memory=options["max_memory"],
        workers=options["workers"],
        scheduler=options["scheduler"],
        overwrite=options["overwrite"],
        sync=options["fsync"],
        fill_absent=options["fill_missing_chunks"],
        order=options["order"],
        command=shlex.join(["shardio", *sys.argv[1:]]),
    )
    make(request, options["dry_run"], options["as_json"])


@main.command()
@click.argument("destination")
@click.option("--grid", default="o96", show_default=True, help="Octahedral grid: o32, o96, o1280, ...")
@click.option("--dates", type=click.IntRange(min=1), default=40, show_default=True, help="How many dates.")
@click.option("--start", default="2020-01-01", show_default=True, help="First date.")
@click.option("--hours", type=click.IntRange(min=1), default=6, show_default=True, help="Hours between dates.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which waves.")
@click.option("--grid-chunks", "-n", type=int, default=1, show_default=True, help="Grid-chunks per date.")
@click.option("--zarr-format", type=click.Choice(["2", "3"]), default="3", show_default=True)
@click.option("--codec", default="lz4", show_default=True, help="lz4, zstd or none.")
@click.option("--max-memory", type=ByteSize(), default="4GiB", show_default=True, help="Of all buffers together.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--fsync/--no-fsync", default=True, show_default=True, help="Survive power loss without redoing work.")
@json_option
def synth(destination: str, **options: Any) -> None:
    """Write linear Rossby waves, an exact solution at every date: a dataset whose every value is known.

    \b
    shardio synth waves.zarr --grid o96 --dates 40
    shardio synth big.zarr --grid o1280 --dates 4 --grid-chunks 16
    """
    from shardio.cli.making import make
    from shardio.rechunk.request import Request
    from shardio.source.synthetic_source import SyntheticSource

    names = ("grid", "dates", "start", "hours", "seed")
    opener = partial(SyntheticSource, **{name: options[name] for name in names})
    request = Request(
        source=opener().path,
        destination=destination,
        grid_chunks=options["grid_chunks"],
        zarr_format=int(options["zarr_format"]),
        codec=options["codec"],
        max_memory=options["max_memory"],
        overwrite=options["overwrite"],
        sync=options["fsync"],
        command=shlex.join(["shardio", *sys.argv[1:]]),
        opener=opener,
    )
    make(request, dry_run=False, as_json=options["as_json"])


@main.command()
@click.argument("path")
@click.option("--ranks", type=click.IntRange(min=1), help="Show what each of so many ranks would read.")
@json_option
def info(path: str, ranks: int | None, as_json: bool) -> None:
    """Show layout, dates, variables, codec, files and statistics of a dataset.

    \b
    shardio info era5-16.zarr --ranks 4
    shardio info era5-16.zarr --json | jq .missing_dates
    """
    from shardio.check.info import describe, print_description

    about = describe(path, ranks)
    if as_json:
        click.echo(json.dumps(about, indent=1))
    else:
        print_description(about)


@main.command()
@click.argument("path")
@click.option("--source", help="Also compare every value with this source, bit for bit.")
@click.option("--repair", is_flag=True, help="Write faulty chunks again from --source.")
@json_option
def verify(path: str, source: str | None, repair: bool, as_json: bool) -> None:
    """Check the checksum of every chunk of PATH. Exit code 1 where anything is not as it was written.

    \b
    shardio verify era5-16.zarr
    shardio verify era5-16.zarr --source era5.zarr
    shardio verify era5-16.zarr --source era5.zarr --repair
    """
    from shardio.check import verify as checks
    from shardio.cli.progress import display
    from shardio.cli.report import tell_faults

    if repair and not source:
        raise click.UsageError("--repair writes chunks again from the source: name it with --source.")
    with display("checksums", _dates_of(path)) as bar:
        faults = checks.check(path, lambda done, of: bar.update(done))
    repaired = 0
    if repair and source and faults:
        repaired = checks.repair(path, source, faults)
        faults = checks.check(path)
    if source and not faults:
        with display("values", _dates_of(path)) as bar:
            faults = checks.compare(path, source, lambda done, of: bar.update(done))
    if as_json:
        found = {"path": path, "faults": [fault.to_json() for fault in faults], "dates_repaired": repaired}
        click.echo(json.dumps(found, indent=1))
    else:
        for fault in faults:
            click.echo(fault)
        click.echo(tell_faults(path, source, len(faults), repaired))
    sys.exit(1 if faults else 0)


@main.command()
@click.argument("path")
@click.option("--ranks", type=click.IntRange(min=1), required=True, help="Ranks of the model group.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Medians of so many rounds.")
@json_option
def bench(path: str, ranks: int, rounds: int, as_json: bool) -> None:
    """Measure how fast one of M ranks gets its shard: loader, limit, tensorstore, whole date.

    \b
    shardio bench era5-16.zarr --ranks 4
    """
    from shardio.check.bench import measure, print_measurement

    found = measure(path, ranks, rounds)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_measurement(found)


@main.command()
@click.argument("path")
@click.option("--variable", required=True, help="Which variable.")
@click.option("--date", help="Which date. Default: the first.")
@click.option("--output", "-o", default="grid-chunks.png", show_default=True, help="PNG to write.")
def plot(path: str, variable: str, date: str | None, output: str) -> None:
    """Draw one field and its grid-chunks.

    \b
    shardio plot era5-16.zarr --variable t_850 --date 2020-03-01T06:00 -o t.png
    """
    from shardio.check.picture import draw

    draw(path, variable, date, output)
    click.echo(f"drew {output}")


def _dates_of(path: str) -> int:
    from shardio.check.verify import Stored

    return Stored(path).layout.shape[0]


if __name__ == "__main__":
    main()
