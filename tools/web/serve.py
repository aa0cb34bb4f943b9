"""Serves the page on localhost. Any static server will do; this one also allows the runtime its threads.

python tools/web/serve.py [PORT]
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import sys
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files, cross-origin isolated: a browser shares memory between threads on no other page."""

    extensions_map = {  # noqa: RUF012  the base class declares it so
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Adds the two headers, and asks the browser to look for newer files each time."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing of single requests."""


def main(port: int = 8000) -> None:
    """Serves until interrupted; port 0 takes a free one."""
    handler = functools.partial(Handler, directory=str(Path(__file__).resolve().parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
