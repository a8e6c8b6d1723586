"""A Hugging Face Hub on this machine, as far as downloads of models see it: an endpoint for HF_ENDPOINT."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Its endpoint, and what it was asked."""

    endpoint: str = ""
    repos: dict[str, Path] = field(default_factory=dict[str, Path])
    """`org/name` -> folder of its files."""
    gated: dict[str, str] = field(default_factory=dict[str, str])
    """`org/name` -> the token that may read its files."""
    claimed: dict[str, int] = field(default_factory=dict[str, int])
    """File name -> size that it says, instead of the real one."""
    downloads: Counter[str] = field(default_factory=Counter[str])
    """`org/name/file` -> times its bytes were sent."""
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Started on a free port."""
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(body=True)

        def do_HEAD(self) -> None:
            self._reply(body=False)

        def log_message(self, *args: Any) -> None:
            pass

        def _reply(self, body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[0] == "api" and parts[1] in ("models", "datasets"):
                self._api("/".join(parts[2:4]), parts[4:], body)
            elif len(parts) >= 5 and parts[2] == "resolve":
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
            else:
                self._refuse(404, "RepoNotFound", body)

        def _api(self, repo: str, rest: list[str], body: bool) -> None:
            revision = rest[1] if len(rest) > 1 else "main"
            if repo not in state.repos:
                return self._refuse(401, "RepoNotFound", body)
            if revision not in state.branches:
                return self._refuse(404, "RevisionNotFound", body)
            files = sorted(file for file in state.repos[repo].iterdir() if file.is_file())
            entries = [{"name": file.name, "size": state.claimed.get(file.name, file.stat().st_size)} for file in files]
            if rest and rest[0] == "tree":
                tree = [
                    {"type": "file", "path": e["name"], "size": e["size"], "oid": _etag(e["name"])} for e in entries
                ]
                return self._json(tree, body)
            siblings = [{"rfilename": entry["name"], "size": entry["size"]} for entry in entries]
            facts = {"id": repo, "modelId": repo, "sha": state.branches[revision], "siblings": siblings}
            return self._json({**facts, "gated": repo in state.gated, "private": False, "tags": []}, body)

        def _file(self, repo: str, revision: str, name: str, body: bool) -> None:
            if repo not in state.repos or not (state.repos[repo] / name).is_file():
                return self._refuse(404, "EntryNotFound", body)
            if (wanted := state.gated.get(repo)) is not None:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token != wanted:
                    return self._refuse(403 if token else 401, "GatedRepo", body)
            content = (state.repos[repo] / name).read_bytes()
            headers = {"X-Repo-Commit": state.branches[revision], "ETag": f'"{_etag(name)}"', "Accept-Ranges": "bytes"}
            if body:
                state.downloads[f"{repo}/{name}"] += 1
            return self._send(200, content, headers, body)

        def _json(self, value: Any, body: bool) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

        def _refuse(self, status: int, code: str, body: bool) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()


def _etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
