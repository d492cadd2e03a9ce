"""Virtual environments of the packages that shardio is compared with, built from PyPI when they are first needed.

python -m tools.peers                      build all of them under .peers/
python -m tools.peers anemoi --venvs DIR   build one

They pin other versions of zarr than shardio does, hence environments of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VENVS = Path(".peers")


class PeerError(Exception):
    """A peer cannot be installed or does not start; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    """What to install, the imports that prove that it works, and what to install without what it says it needs."""

    requirements: tuple[str, ...]
    imports: tuple[str, ...]
    alone: tuple[str, ...] = ()


PEERS = {
    "anemoi": Peer(("anemoi-datasets>=0.5", "zarr>=2.18,<3"), ("anemoi.datasets", "anemoi.datasets.commands.copy")),
    "anemoi-models": Peer(  # which asks for torch<2.11, and runs with the one that shardio is measured with
        ("torch==2.13.0", "torch-geometric", "einops>=0.6.1", "hydra-core>=1.3", "scipy", "anemoi-utils>=0.5"),
        ("anemoi.models.models", "torch_geometric"),
        ("anemoi-models==0.19.0", "anemoi-graphs==0.9.8"),
    ),
    "rechunker": Peer(("rechunker==0.5.*", "dask[array]", "zarr>=2.18,<3"), ("rechunker",)),
}


@dataclass(frozen=True)
class Environments:
    """Where environments are built, and those that exist already elsewhere."""

    venvs: Path = VENVS
    existing: Mapping[str, Path] | None = None

    def python(self, name: str) -> Path:
        """The interpreter of a peer, built if need be; PeerError says why there is none."""
        if self.existing and name in self.existing:
            python = interpreter(self.existing[name])
        else:
            python = interpreter(self.venvs / name)
            if not (self.venvs / name / "complete").exists():
                build(PEERS[name], self.venvs / name)
        imports = "; ".join(f"import {module}" for module in PEERS[name].imports)
        run([str(python), "-W", "ignore", "-c", imports], f"{name} is installed but does not start")
        return python


def build(peer: Peer, folder: Path) -> None:
    """Make an environment from nothing."""
    print(f"building {folder} with {', '.join(peer.requirements + peer.alone)}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    python = interpreter(folder)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    run([*install, *peer.requirements], "pip cannot install it")
    if peer.alone:
        run([*install, "--no-deps", *peer.alone], "pip cannot install it")
    (folder / "complete").touch()


def interpreter(folder: Path) -> Path:
    """The python of an environment."""
    return folder.absolute() / "bin" / "python"


def run(
    command: list[str], failure: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """Standard output of a command; PeerError with the last line it wrote where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    except OSError as error:
        raise PeerError(f"{failure}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise PeerError(f"{failure}: {last}")
    return done.stdout


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `environments` understands."""
    parser.add_argument("--venvs", type=Path, default=VENVS, help="folder of the peers' environments")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=VENV",
        help="use an existing environment for this peer; may be given again",
    )


def environments(options: argparse.Namespace) -> Environments:
    """What the options of `add_options` say."""
    existing = dict(pair.split("=", 1) for pair in options.peer)
    return Environments(options.venvs, {name: Path(folder) for name, folder in existing.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the peers' virtual environments.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(PEERS)}. Default: all")
    add_options(parser)
    options = parser.parse_args()
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"no peer is called {', '.join(sorted(unknown))}. There are: {', '.join(PEERS)}")
    available = environments(options)
    failed = 0
    for name in options.names or PEERS:
        try:
            print(f"{name}: {available.python(name)}")
        except PeerError as reason:
            print(f"{name}: {reason}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
