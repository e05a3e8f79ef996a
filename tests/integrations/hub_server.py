"""A small server of the hub's HTTP interface: what huggingface_hub asks of it to upload and to download models.

Files are stored as git and Git LFS store them: small texts come with the commit, binary files by LFS's basic transfer.
The other transfer, xet, is a protocol of its own with chunks and is not served: clients set ``HF_HUB_DISABLE_XET``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml


def git_oid(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    repositories: ClassVar[dict[str, dict[str, bytes]]]
    objects: ClassVar[dict[str, bytes]]  # of LFS, by their SHA-256
    commits: ClassVar[dict[str, str]]
    requests: ClassVar[list[str]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815 - http.server's names

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size) if size else self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                answer(self, *match.groups())
                return
        self._send(404, {"error": f"no such address: {path}"})

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _send(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _files(self, name: str) -> dict[str, bytes] | None:
        if name not in self.repositories:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.repositories.get(name)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        there = name in self.repositories
        self.repositories.setdefault(name, {})
        self.commits.setdefault(name, "0" * 40)
        self._send(409 if there else 200, {"url": f"{self._address()}/{name}", "name": name})

    def info(self, name: str) -> None:
        files = self._files(name)
        if files is not None:
            listed = [{"rfilename": file} for file in sorted(files)]
            self._send(200, {"id": name, "modelId": name, "sha": self.commits[name], "tags": [], "siblings": listed})

    def validate(self) -> None:
        """The metadata of a card must be YAML with a licence; the hub checks more."""
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        told = yaml.safe_load(found[1]) if found else {}
        errors = [] if isinstance(told, dict) else [{"message": "metadata must be a mapping"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str) -> None:
        files = self._files(name)
        if files is not None:
            told = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                    "shouldIgnore": False,
                    "oid": git_oid(files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._send(200, {"files": told})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body)["objects"]
        told: list[dict[str, Any]] = [{"oid": one["oid"], "size": one["size"]} for one in asked]
        for one in told:
            if one["oid"] not in self.objects:
                one["actions"] = {"upload": {"href": f"{self._address()}/lfs/{one['oid']}"}}
        self._send(200, {"transfer": "basic", "objects": told})

    def store(self, oid: str) -> None:
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.objects[oid] = self.body
        self._send(200 if right else 422)

    def commit(self, name: str) -> None:
        files = self._files(name)
        if files is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        oid = hashlib.sha1(self.commits[name].encode() + self.body).hexdigest()
        self.commits[name] = oid
        self._send(200, {"commitUrl": f"{self._address()}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, name: str, revision: str, file: str) -> None:
        files = self._files(name)
        if files is None:
            return
        if revision not in ("main", self.commits[name]):
            self._send(404, {"error": f"no revision {revision}"}, X_Error_Code="RevisionNotFound")
        elif file not in files:
            self._send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commits[name])
        else:
            content = files[file]
            self._send(200, content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=self.commits[name])


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/api/repos/create", _Hub.create),
    ("POST", "/api/validate-yaml", _Hub.validate),
    ("GET", f"/api/models/{_NAME}(?:/revision/main)?", _Hub.info),
    ("POST", f"/api/models/{_NAME}/preupload/main", _Hub.preupload),
    ("POST", f"/api/models/{_NAME}/commit/main", _Hub.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Hub.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Hub.store),
    ("HEAD GET", rf"/{_NAME}/resolve/([\w.]+)/(.+)", _Hub.resolve),
)


@contextmanager
def hub() -> Iterator[tuple[str, type[_Hub]]]:
    """An empty hub: its address, and what it holds and was asked."""
    state: Any = type("Hub", (_Hub,), dict(repositories={}, objects={}, commits={}, requests=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), state)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
