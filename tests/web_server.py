"""A real HTTP server on loopback that answers byte ranges, and can be told to fail or to stall on chunks."""

from __future__ import annotations

import re
import sys
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    """Whole files and single ranges; `mode` says what happens to requests for chunks."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, mode: str, stop: threading.Event, directory: str):
        self.mode, self.stop = mode, stop
        super().__init__(*args, directory=directory)

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        is_chunk = path.parent.name == "data" and path.suffix != ".json" and not path.name.startswith(".")
        if is_chunk and self.mode == "stall":
            self.stop.wait(60)
            self.close_connection = True
            return
        if is_chunk and self.mode == "fail":
            self.send_error(500)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        tag = zlib.crc32(content)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, content, tag)
            return
        first, last = wanted[1], wanted[2]
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        self._answer(206, content[start:end], tag, f"bytes {start}-{end - 1}/{len(content)}")

    def _answer(self, status: int, body: bytes, tag: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{tag:08x}"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)


class WebServer:
    """Serves `folder` on a free port for the time of a `with`."""

    def __init__(self, folder: Path, mode: str = "serve"):
        self._stop = threading.Event()
        handler = partial(Handler, mode=mode, stop=self._stop, directory=str(folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    with WebServer(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "serve") as server:
        print(server.url, flush=True)
        threading.Event().wait()
