"""A hub on loopback: repositories in memory, and the errors of a real one."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ERRORS = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "no-revision": (404, "RevisionNotFound")}


class Hub:
    """Files by repository and revision; what was asked of it; and the tokens that came with it."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        self.refuses: int | None = None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.server, self.address = server, f"http://127.0.0.1:{server.server_port}"

    def put(self, repository: str, folder: Path) -> str:
        """A folder's files as a repository; returns its commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repositories[repository] = {"main": files}
        return commit_of(files)

    def find(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or commit."""
        branches = self.repositories.get(repository, {})
        by_commit = {commit_of(files): files for files in branches.values()}
        return branches.get(revision, by_commit.get(revision))


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's name: 40 digits that depend on the files."""
    listing = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
    return hashlib.sha1(repr(listing).encode()).hexdigest()


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: Any = None, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refused(self, repository: str, revision: str) -> bool:
            """Answer with an error if there is no such thing."""
            kind = repository.split("/")[-1]
            if kind not in ERRORS and hub.find(repository, revision) is None:
                kind = "missing" if repository not in hub.repositories else "no-revision"
            if kind in ERRORS:
                status, code = ERRORS[kind]
                self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)
            return kind in ERRORS

        def note(self) -> str:
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            return unquote(urlsplit(self.path).path)

        def do_GET(self) -> None:
            path = self.note()
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+?))?(/|$)", path)
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if tree is not None:
                repository, revision = tree[1], tree[2]
                if not self.refused(repository, revision):
                    files = hub.find(repository, revision) or {}
                    self.answer(
                        200, [{"type": "file", "path": n, "size": len(d), "oid": _sha(d)} for n, d in files.items()]
                    )
            elif info is not None:
                repository, revision = info[1], info[2] or "main"
                if not self.refused(repository, revision):
                    files = hub.find(repository, revision) or {}
                    content = {"id": repository, "sha": commit_of(files), "private": False, "tags": [], "downloads": 0}
                    self.answer(200, {**content, "likes": 0, "siblings": [{"rfilename": name} for name in files]})
            elif file is not None:
                self.give(file[1], file[2], file[3])
            else:
                self.answer(404, {"error": path})

        do_HEAD = do_GET

        def give(self, repository: str, revision: str, name: str) -> None:
            if self.refused(repository, revision):
                return
            files = hub.find(repository, revision) or {}
            if name not in files:
                self.answer(404, {"error": name}, X_Error_Code="EntryNotFound")
                return
            about = {"ETag": f'"{_sha(files[name])}"', "X_Repo_Commit": commit_of(files)}
            self.answer(200, files[name], **about, Content_Type="application/octet-stream")

        def do_POST(self) -> None:
            path = self.note()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.refuses is not None:
                self.answer(hub.refuses, {"error": "refused"})
            elif path == "/api/repos/create":
                asked = json.loads(body)
                hub.created.append(asked)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                hub.repositories.setdefault(name, {"main": {}})
                self.answer(200, {"url": f"{hub.address}/{name}", "id": "1", "name": name})
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path)) is not None:
                hub.repositories[match[1]].setdefault(match[2], {})
                self.answer(200, {})
            elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path)) is not None:
                names = [entry["path"] for entry in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self.answer(200, {"files": modes})
            elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path)) is not None:
                files = hub.repositories[match[1]].setdefault(match[2], {})
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                commit = commit_of(files)
                self.answer(200, {"commitOid": commit, "commitUrl": f"{hub.address}/{match[1]}/commit/{commit}"})
            else:
                self.answer(404, {"error": path, "query": parse_qs(urlsplit(self.path).query)})

    return Handler


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
