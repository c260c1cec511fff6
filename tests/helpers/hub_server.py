"""A small hub on the loopback: it serves local folders as models (data sets where a name begins with `datasets/`),
refuses as the real one does, and notes requests."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@dataclass
class Repo:
    """A model: its folder (files of subfolders too), and what is wrong with it.

    refusal: (status, X-Error-Code, X-Error-Message) of every request; files_refusal: of downloads alone; sizes: what
    the listing claims for files, true or not; tags: other names of its commit; large: suffixes of files that are
    listed with their SHA-256, the others with git's digest; spoilt: files that come with other bytes than listed.
    """

    folder: Path | None = None
    refusal: tuple[int, str, str] | None = None
    files_refusal: tuple[int, str, str] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    large: tuple[str, ...] = (".parquet", ".safetensors")
    spoilt: set[str] = field(default_factory=set)

    @property
    def commit(self) -> str:
        """A commit that goes with the folder's name."""
        return hashlib.sha1(str(self.folder).encode()).hexdigest()


@dataclass
class Hub:
    """The running server: its address, and (method, path) of every request so far;
    "GET of a part" is one for a range of bytes.

    tokens: those that may write (200), or what the others are refused with; pushed: {repo: {file: content}};
    public: repos that anybody may read; large: suffixes of files that are taken over Git LFS; objects: what came so;
    uploads_refused: repos that take no commit (status).
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    large: tuple[str, ...] = ()
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads_refused: dict[str, int] = field(default_factory=dict)

    def downloads(self, suffix: str = "") -> list[str]:
        """The files that were downloaded, as `org/name/file`."""
        found = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        names = [path.strip("/").split("/resolve/")[0] + "/" + path.split("/", 5)[5] for path in found]
        return sorted(name for name in names if name.endswith(suffix))


def _repo_and_rest(path: str) -> tuple[str, list[str]]:
    """The repo that a request is about, and the rest of its path."""
    parts = path.strip("/").removeprefix("api/").removeprefix("models/").split("/")
    start = 3 if parts[0] == "datasets" else 2
    return "/".join(parts[:start]), parts[start:]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            if hub.tokens and not self.path.startswith("/api/datasets/"):
                return self._take()
            return self._answer()

        def do_PUT(self) -> None:
            """Take an object of Git LFS, at the address that the batch request was answered with."""
            hub.requests.append((self.command, self.path))
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
            hub.objects[self.path.removeprefix("/lfs/")] = content
            self._send(200, b"", {})

        def _take(self) -> None:
            """Make a repo, or take files into one, if the token may."""
            hub.requests.append((self.command, self.path))
            status = hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "), 401)
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if status != 200:
                return self._refuse(status, "", "You do not have the rights")
            lines = [json.loads(line) for line in content.splitlines()]
            name, parts = _repo_and_rest(self.path)
            if self.path == "/api/repos/create":
                name = "/".join((lines[0]["organization"], lines[0]["name"]))
                if name in hub.pushed:
                    return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
                hub.pushed[name] = {}
                if lines[0].get("visibility") != "private" and not lines[0].get("private"):
                    hub.public.add(name)
            if self.path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}}
                    for entry in lines[0]["objects"]
                ]
                return self._json({"transfer": "basic", "objects": objects})
            if parts[:1] == ["preupload"]:
                paths = [entry["path"] for entry in lines[0]["files"]]
                modes = {path: "lfs" if path.endswith(hub.large or "/") else "regular" for path in paths}
                asked = [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]
                return self._json({"files": asked})
            if parts[:1] == ["commit"]:
                if name in hub.uploads_refused:
                    return self._refuse(hub.uploads_refused[name], "", "The commit is refused")
                files = [line["value"] for line in lines if line["key"] == "file"]
                hub.pushed[name] |= {entry["path"]: base64.b64decode(entry["content"]) for entry in files}
                large = [line["value"] for line in lines if line["key"] == "lfsFile"]
                hub.pushed[name] |= {entry["path"]: hub.objects[entry["oid"]] for entry in large}
            url = f"{hub.url}/{name}"
            return self._json({"url": url, "commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40})

        def _answer(self) -> None:
            path = unquote(urlparse(self.path).path)
            part = " of a part" if "Range" in self.headers else ""
            hub.requests.append((self.command + part, path))
            name, parts = _repo_and_rest(path)
            if name in hub.pushed:
                return self._json({"id": name, "private": name not in hub.public})
            repo = hub.repos.get(name)
            if repo is None:
                return self._refuse(404, "RepoNotFound", "Repository not found")
            if repo.refusal:
                return self._refuse(*repo.refusal)
            assert repo.folder is not None
            kind, revision, *rest = parts or ["revision", "main"]
            file = "/".join(rest)
            if revision not in ("main", repo.commit, *repo.tags):
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if kind == "revision":
                names = [{"rfilename": name} for name in self._files(repo)]
                return self._json({"id": name.removeprefix("datasets/"), "sha": repo.commit, "siblings": names})
            if kind in ("tree", "paths-info"):
                return self._json(self._entries(repo, file))
            if repo.files_refusal:
                return self._refuse(*repo.files_refusal)
            if not (repo.folder / file).is_file():
                return self._refuse(404, "EntryNotFound", "Entry not found")
            content = (repo.folder / file).read_bytes()
            return self._file(repo, content[:-1] + b"?" if file in repo.spoilt else content)

        def _entries(self, repo: Repo, folder: str) -> list[dict[str, Any]]:
            """What lies in a folder of a repo, or what stands at the paths that a POST asks for."""
            entries = [self._entry(repo, path, size) for path, size in self._files(repo).items()]
            folders = {str(parent) for entry in entries for parent in Path(entry["path"]).parents} - {"."}
            entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
            if self.command != "POST":
                return [entry for entry in entries if not folder or entry["path"].startswith(f"{folder}/")]
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            return [entry for entry in entries if entry["path"] in asked]

        def _entry(self, repo: Repo, path: str, size: int) -> dict[str, Any]:
            assert repo.folder is not None
            content = (repo.folder / path).read_bytes()
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": repo.sizes.get(path, size), "oid": oid}
            if path.endswith(repo.large):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
            return entry

        def _files(self, repo: Repo) -> dict[str, int]:
            assert repo.folder is not None
            found = (f for f in sorted(repo.folder.rglob("*")) if f.is_file())
            return {f.relative_to(repo.folder).as_posix(): f.stat().st_size for f in found}

        def _file(self, repo: Repo, content: bytes) -> None:
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repo.commit}
            asked = self.headers.get("Range")
            if asked:
                first, last = (int(x) for x in asked.removeprefix("bytes=").split("-"))
                headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                content = content[first : last + 1]
            self._send(206 if asked else 200, content, headers)

        def _json(self, data: Any, status: int = 200) -> None:
            self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            self._send(status, json.dumps({"error": message}).encode(), headers)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free port of the loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
