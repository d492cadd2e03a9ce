"""The README is true: its commands run, print what it says, and its file tree is the one there is."""

import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def script() -> str:
    """All console and Python blocks as one shell script, which stops at the first command that fails."""
    lines = ["set -eu"]
    for language, block in BLOCKS:
        if language == "python":
            lines.append(f"python - <<'END_OF_PYTHON'\n{block}END_OF_PYTHON")
        lines += [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    return "\n".join(lines).replace("8786", str(free_port()))


def promised() -> list[str]:
    return [
        line for language, block in BLOCKS if language == "console" for line in block.splitlines() if line[:2] != "$ "
    ]


def run(folder: Path, commands: str) -> tuple[int, str]:
    """Run a shell script and everything it left in the background, as a user's terminal would, and end it all."""
    path = f"{Path(sys.executable).parent}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        shell = subprocess.Popen(
            ["bash", "-c", commands],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout=300)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
    return code, (folder / "stderr").read_text()


def test_commands_of_the_readme_run_in_order_and_print_what_it_says(tmp_path: Path) -> None:
    code, errors = run(tmp_path, f"{script()}\necho samples=$samples")
    assert code == 0, errors
    printed = (tmp_path / "stdout").read_text().splitlines()
    samples = printed[-1].removeprefix("samples=")
    assert [line for line in promised() if line.replace("$samples", samples) not in printed] == []
    made = {path.name for path in tmp_path.glob("*.zarr")}
    assert made == {"o32.zarr", "o96.zarr", "o96-16.zarr", "o96-8.zarr", "sst.zarr", "polar.zarr", "tropics.zarr"}


@pytest.mark.parametrize(("program", "fewest"), [("shardio", 9), ("trainer", 3)])
def test_every_command_of_the_readme_is_in_a_block_that_runs(program: str, fewest: int) -> None:
    commands = re.findall(rf"^\$? ?({program} \w+ .*)$", README, re.MULTILINE)
    in_blocks = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith(f"$ {program} ")]
    assert len(commands) == len(in_blocks) >= fewest


@pytest.mark.parametrize("package", ["shardio", "trainer"])
def test_rooms_of_the_readme_are_those_there_are(package: str) -> None:
    tree = re.split(r"```|\n\w+/\n", README[README.index(f"\n{package}/\n") + len(package) + 3 :])[0]
    listed = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert sorted(listed) == sorted(rooms)


@pytest.mark.parametrize(
    "init", [path for name in ("shardio", "trainer") for path in ROOT.glob(f"{name}/*/__init__.py")]
)
def test_a_room_says_what_passes_through_it(init: Path) -> None:
    assert len(init.read_text().split('"""')[1]) > 60


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_link_of_the_readme_leads_somewhere(link: str) -> None:
    assert (ROOT / link).is_file()


def test_messages_of_the_troubleshooting_table_are_those_of_the_code() -> None:
    table = (ROOT / "docs/rechunk.md").read_text().split("## Troubleshooting")[1]
    messages = [text for row in table.splitlines() for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    code = "".join(path.read_text() for path in (ROOT / "shardio").rglob("*.py"))
    code = re.sub(r"\{[^{}]*\}", "...", re.sub(r"\"\s*\n\s*f?\"", "", code))

    def said(message: str) -> bool:
        return all(part in code for part in message.split(" ... ") if part.strip(". "))

    assert [text for text in messages if not said(text.removeprefix("... ").removesuffix(" ..."))] == []
