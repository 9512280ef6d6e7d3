# ruff: noqa: RET501, RET503 (handlers answer and return nothing)
"""A small Hub on loopback that the real huggingface_hub client talks to, with faults on order.

It keeps commits in memory and large files by their SHA-256, answers the endpoints that reading, publishing, branches,
pull requests and server-side copies need, and checks what a real Hub checks: tokens, visibility, parent commits, and
that a large file was really uploaded before a commit names it. Start it with `with LoopbackHub() as hub`, give clients
`hub.environment()` before they import huggingface_hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE_FILE = re.compile(r"\.(safetensors|bin|png|model)$")


@dataclass
class Blob:
    """A file: its bytes, and for a large file the SHA-256 under which it was uploaded."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    has_xet: bool = True

    def add_commit(self, ref: str, files: dict[str, Blob], title: str) -> Commit:
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.id}{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong: `action` is a status, "reset" (mid-request), or a function called with the handler."""

    method: str
    path: str
    action: int | str | Callable[[Any], bool]
    times: int = 1
    code: str | None = None
    message: str = "injected"

    def applies(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


class LoopbackHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {"hf_writer": "writer"}
        self.read_only: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "hf_writer") -> dict[str, str]:
        """Environment of a client process; it inherits no token and no cache."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        return {**inherited, **own, **({"HF_TOKEN": token} if token else {})}

    def add_folder(self, repo_id: str, folder: Path, private: bool = False, ref: str = "main") -> Repo:
        """Puts a folder on the Hub without a client."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private))
        files = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            files[path.relative_to(folder).as_posix()] = self._store(repo, path.name, path.read_bytes())
        repo.add_commit(ref, files, "initial")
        return repo

    def _store(self, repo: Repo, name: str, content: bytes) -> Blob:
        if not LARGE_FILE.search(name):
            return Blob(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        repo.stored.add(sha256)
        return Blob(content, sha256)

    def main_files(self, repo_id: str) -> dict[str, Blob]:
        return self.repos[repo_id].commits[self.repos[repo_id].refs["main"]].files

    def count(self, method: str, path: str) -> int:
        return sum(1 for seen, where in self.requests if seen == method and re.search(path, where))


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    # ------------------------------------------------------------------------------------------------ plumbing

    def _dispatch(self) -> None:
        self.hub.requests.append((self.command, self.path))
        with self.hub.lock:
            fault = next((fault for fault in self.hub.faults if fault.applies(self.command, self.path)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and not self._inject(fault):
            return None
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and method == self.command:
                return answer(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        self._body()
        self._error(404, "no such endpoint on this Hub")

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _inject(self, fault: Fault) -> bool:
        """True if the request goes on as usual afterwards."""
        if fault.action == "reset":
            self.rfile.read(min(1024, int(self.headers.get("Content-Length", 0))))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return False
        if callable(fault.action):
            return fault.action(self)
        self._body()
        self._error(int(fault.action), fault.message, fault.code)
        return False

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        extra = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
        self._send({"error": message}, status, **extra)

    def _user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repo(self, repo_id: str, write: bool = False) -> Repo | None:
        """The repository, or None after the error that a real Hub gives."""
        if self.headers.get("Authorization") and self._user() is None:
            return self._error(401, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self._user() is None):
            return self._error(404 if self._user() else 401, "Repository not found", "RepoNotFound")
        if write and (self._user() is None or self._user() in self.hub.read_only):
            return self._error(403, "You don't have the rights to write here")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit | None:
        commit = repo.resolve(revision)
        return commit or self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @staticmethod
    def _entry(repo: Repo, path: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            if repo.has_xet:
                entry["xetHash"] = blob.sha256[::-1]
        return entry

    # ----------------------------------------------------------------------------------------------- endpoints

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            return self._error(401, "Invalid credentials in Authorization header")
        self._send({"name": user, "type": "user", "orgs": []})

    def create_repo(self) -> None:
        request = json.loads(self._body())
        repo_id = f"{request.get('organization') or self._user()}/{request['name']}"
        if self._user() is None:
            return self._error(401, "Invalid credentials in Authorization header")
        if repo_id.split("/")[0] != self._user():
            return self._error(403, "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self._send({**url, "error": "You already created this model repo"}, 409)
        repo = self.hub.repos[repo_id] = Repo(
            repo_id, request.get("visibility") == "private" or bool(request.get("private"))
        )
        repo.add_commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        self._send(url)

    def validate_yaml(self) -> None:
        content = json.loads(self._body())["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        repo = self._repo(repo_id, write="create_pr" not in self.query)
        commit = repo and self._commit_of(repo, revision)
        if not commit:
            return
        present = {file["path"]: commit.files.get(file["path"]) for file in files}
        self._send(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if LARGE_FILE.search(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": present[file["path"]] and present[file["path"]].etag,
                    }
                    for file in files
                ]
            }
        )

    def lfs_batch(self, repo_id: str) -> None:
        objects = json.loads(self._body())["objects"]
        repo = self._repo(repo_id)
        if repo is None:
            return
        for item in objects:
            if item["oid"] not in repo.stored:
                upload = f"{self.hub.endpoint}/lfs/{repo_id}/{item['oid']}"
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": upload + "/verify"}}
        self._send({"objects": objects})

    def lfs_put(self, repo_id: str, oid: str) -> None:
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._error(400, "content does not match its oid")
        self.hub.blobs[oid] = content
        self._send()

    def lfs_verify(self, repo_id: str, oid: str) -> None:
        self._body()
        if oid not in self.hub.blobs:
            return self._error(404, "not uploaded")
        self.hub.repos[repo_id].stored.add(oid)
        self._send({})

    def duplicate(self, repo_id: str) -> None:
        request = json.loads(self._body())
        source, target = self._repo(repo_id), self.hub.repos.get(request["target"]["name"])
        if source is None or target is None:
            return
        failed = [file for file in request["files"] if file["sha256"] not in source.stored]
        target.stored |= {file["sha256"] for file in request["files"]} & source.stored
        self._send({"failed": [{**file, "error": "not found"} for file in failed]})

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        pull_request = "create_pr" in self.query
        repo = self._repo(repo_id, write=not pull_request)
        with self.hub.lock:
            parent = repo and self._commit_of(repo, revision)
            if not parent:
                return None
            header = lines[0]["value"]
            if header.get("parentCommit") not in (None, parent.oid):
                return self._error(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if value["oid"] not in repo.stored:
                        return self._error(400, f"large file {value['path']} was not uploaded")
                    files[value["path"]] = Blob(self.hub.blobs[value["oid"]], value["oid"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            ref = f"refs/pr/{len(repo.discussions) + 1}" if pull_request else revision
            if pull_request:
                repo.refs[ref] = parent.oid
                self.hub_discussion(repo, self._user() or "somebody", header["summary"])
            commit = repo.add_commit(ref, files, header["summary"])
        answer = {"commitOid": commit.oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{len(repo.discussions)}"
        self._send(answer)

    @staticmethod
    def hub_discussion(repo: Repo, author: str, title: str) -> None:
        repo.discussions.append(
            {
                "num": len(repo.discussions) + 1,
                "title": title,
                "author": {"name": author},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo.id, "type": "model"},
                "isPullRequest": True,
            }
        )

    def branch(self, repo_id: str, revision: str) -> None:
        self._body()
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        if revision in repo.refs:
            return self._error(409, "Reference already exists")
        repo.refs[revision] = repo.refs["main"]
        self._send({})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        commit = repo and self._commit_of(repo, revision)
        if not commit:
            return
        card = commit.files.get("README.md", Blob(b"")).content.decode()
        tag = re.search(r"^pipeline_tag: (.*)$", card, flags=re.MULTILINE)
        config = json.loads(commit.files["config.json"].content) if "config.json" in commit.files else {}
        self._send(
            {
                "id": repo_id,
                "sha": commit.oid,
                "private": repo.private,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "library_name": "transformers",
                "pipeline_tag": tag.group(1) if tag else None,
                "config": {"auto_map": config.get("auto_map"), "model_type": config.get("model_type")},
            }
        )

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        repo = self._repo(repo_id)
        commit = repo and self._commit_of(repo, revision)
        if not commit:
            return None
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(folder)}
        if folder and not inside:
            return self._error(404, "no such folder", "EntryNotFound")
        if self.query.get("recursive", [""])[0].lower() not in ("1", "true"):
            inside = {path: blob for path, blob in inside.items() if "/" not in path[len(folder) :].strip("/")}
        self._send([self._entry(repo, path, blob) for path, blob in sorted(inside.items())])

    def paths_info(self, repo_id: str, revision: str) -> None:
        paths = parse_qs(self._body().decode())["paths"]
        repo = self._repo(repo_id)
        commit = repo and self._commit_of(repo, revision)
        if commit:
            self._send([self._entry(repo, path, commit.files[path]) for path in paths if path in commit.files])

    def discussion_list(self, repo_id: str) -> None:
        repo = self._repo(repo_id)
        if repo is not None:
            author = self.query.get("author", [None])[0]
            found = [item for item in repo.discussions if author in (None, item["author"]["name"])]
            self._send({"discussions": found, "count": len(found), "start": 0})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        commit = repo and self._commit_of(repo, revision)
        if not commit:
            return None
        blob = commit.files.get(path)
        if blob is None:
            extra = {"X_Repo_Commit": commit.oid, "X_Error_Code": "EntryNotFound"}
            return self._send({"error": "Entry not found"}, 404, **extra)
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept_Ranges": "bytes"}
        if blob.sha256:
            headers |= {"X_Linked_Etag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.content))}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        content = blob.content[int(start.group(1)) :] if start else blob.content
        if self.command == "HEAD":
            headers["Content_Length"] = str(len(blob.content))
        self._send(content, 206 if start else 200, **headers)


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+|refs/pr/\d+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", f"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    ("POST", f"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)/verify", _Handler.lfs_verify),
    ("POST", f"/api/models/{_REPO}/lfs-files/duplicate", _Handler.duplicate),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", _Handler.branch),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", _Handler.tree),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}/(?P<folder>.+)", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", f"/api/models/{_REPO}/discussions", _Handler.discussion_list),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Waits until the server has seen what a test waits for."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)
