"""The command `trainer export`: a checkpoint as a program that needs none of this code."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from trainer.cli.flags import Parser, parse, parser_of
from trainer.predict.export import check_output, compile_program, compiled_path, export
from trainer.predict.forecast import load

DESCRIPTION = """Write a trained model as a torch.export program, which steps fields in the units of the dataset.

  trainer export --ckpt_path run/checkpoints/last.ckpt --dataset o32.zarr --output model.pt2
  trainer export --ckpt_path run/checkpoints/last.ckpt --dataset o32.zarr --output model.pt2 --aoti

The program is for one rank, whatever ranks trained it. --aoti also compiles it, for C++: model.aoti.pt2."""


def build_parser() -> Parser:
    """The options of `trainer export`."""
    parser = parser_of("export", DESCRIPTION, "--ckpt_path FILE --dataset PATH")
    add = parser.add_argument
    add("--ckpt_path", type=str, required=True, help="Checkpoint that `trainer fit` wrote, on whatever ranks.")
    add("--dataset", type=str, required=True, help="Gives the grid; of the training, or of the same grid.")
    add("--output", type=str, default="model.pt2", help="The program.")
    add("--aoti", action="store_true", help="Compile it too, with AOTInductor: model.aoti.pt2. Needs g++ or clang++.")
    add("--num_chunks", type=int, default=1, help="Parts of encoder and decoder: more parts, less memory.")
    add("--overwrite", action="store_true", help="Replace files that are there.")
    add("--json", action="store_true", help="Print the result as JSON.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def main(arguments: list[str]) -> None:
    """One process; what the files are goes to stdout."""
    options = parse(build_parser(), arguments)
    check_output(options.output, options.overwrite)
    if options.aoti:
        check_output(compiled_path(options.output), options.overwrite)
    began = time.monotonic()
    done = export(
        load(options.ckpt_path, options.dataset, num_chunks=options.num_chunks), options.output, options.overwrite
    )
    result: dict[str, Any] = {"path": str(done.path), "bytes": done.nbytes, "nodes": done.nodes, **done.about}
    if not options.json:
        print(
            f"wrote {done.path}: {done.nodes} nodes, {done.nbytes / 2**20:.1f} MiB, {len(done.about['inputs'])} "
            f"variables in, {len(done.about['outputs'])} out, in {time.monotonic() - began:.0f} s",
            flush=True,
        )
    if options.aoti:
        began = time.monotonic()
        print("compiling: minutes for a deep model", file=sys.stderr)
        compiled = compile_program(options.output, options.overwrite)
        result |= {"compiled": str(compiled), "compiled_bytes": compiled.stat().st_size}
        if not options.json:
            print(f"wrote {compiled}: {compiled.stat().st_size / 2**20:.1f} MiB, in {time.monotonic() - began:.0f} s")
    if options.json:
        print(json.dumps(result))
