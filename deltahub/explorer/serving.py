"""A page on this machine, for one browser: bound to 127.0.0.1, and only for who has the token."""

from __future__ import annotations

__all__ = ["served"]

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@contextmanager
def served(text: str, *, port: int = 0) -> Iterator[str]:
    """Serve one page while the block runs.

    Args:
        text: the page.
        port: where; any that is free by default.

    Yields:
        The address, with a token that is made for this run; without it there is nothing to see.
    """
    token = secrets.token_urlsafe(24)
    body = text.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            given = parse_qs(asked.query).get("token", [""])[0]
            # Another site's page may make a browser ask here under a name of its own: only our own is answered.
            ours = self.headers.get("Host", "") in {f"127.0.0.1:{bound}", f"localhost:{bound}"}
            if not ours or asked.path != "/" or not secrets.compare_digest(given.encode(), token.encode()):
                self.send_error(403)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        bound = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound}/?token={token}"
        finally:
            server.shutdown()
            thread.join()
