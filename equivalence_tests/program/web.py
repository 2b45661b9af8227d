"""A web server on this machine that serves weights, as download.pytorch.org and the Hub do."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site(ThreadingHTTPServer):
    """Serves `files`, {path: content}; `kind` chooses a fault of the server."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.kind, self.asked = {}, "sound", []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def publish(self, repo: str, name: str, content: bytes):
        """Add a file of a repository of the Hub."""
        self.files[f"/{repo}/resolve/main/{name}"] = content


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body: bool):
        site = self.server
        site.asked.append(self.path)
        content, status = site.files.get(self.path), 200
        if site.kind == "html":
            content = b"<!DOCTYPE html><title>Sign in to the Wi-Fi</title>"
        elif content is None:
            content, status = b"Entry not found", 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 404 and self.path.count("/") > 4:
            repo = self.path.partition("/resolve/")[0]
            known = any(path.startswith(repo + "/") for path in site.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        if "/resolve/" in self.path and status == 200 and site.kind != "html":
            self.send_header("X-Repo-Commit", "0123456789" * 4)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if site.kind == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if body:
            self.wfile.write(content[: len(content) // 2] if site.kind == "cut" else content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served():
    """Yields a `Site` that answers."""
    site = Site()
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
        thread.join()
