"""A stand-in for the hub's HTTP API on this machine: it records what huggingface_hub uploads."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0" * 40


@dataclass
class HubStandIn:
    """What was uploaded.

    Args:
        url: address of the server.
        created: payloads of the requests for a new repository.
        cards: metadata of cards that the hub was asked to check.
        files: content by path.
        deleted: paths that the commit deletes.
        tokens: values of the header of authorisation.
        refuses: status by which new repositories are refused; 0 accepts them.
    """

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuses: int = 0
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON value of the answer to a request."""
        match method, path:
            case "PUT", _:
                self.large[path.rpartition("/")[2]] = body
                return 200, {}
            case "POST", "/api/repos/create":
                self.created.append(json.loads(body))
                return self.refuses or 200, {"url": f"{self.url}/me/mine", "error": "refused"}
            case "POST", "/api/validate-yaml":
                self.cards.append(json.loads(body)["content"])
                return 200, {"errors": [], "warnings": []}
            case "POST", "/api/models/me/mine/preupload/main":
                modes = {True: "lfs", False: "regular"}
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
                return 200, {"files": files}
            case "POST", "/me/mine.git/info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                uploads = [o | {"actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}} for o in objects]
                return 200, {"transfer": "basic", "objects": uploads}
            case "POST", "/api/models/me/mine/commit/main":
                for line in map(json.loads, body.splitlines()):
                    self._commit(line["key"], line["value"])
                return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/me/mine/commit/{COMMIT}"}
            case "GET", "/api/models/me/mine/tree/main":
                return 200, [{"type": "file", "path": "old.safetensors", "size": 1, "oid": COMMIT}]
        return 404, {"error": f"no {method} {path}"}

    def _commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.large[value["oid"]]
        elif key == "deletedFile":
            self.deleted.append(value["path"])


@contextmanager
def hub_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """Serve a stand-in, and let huggingface_hub take it for the hub. Large files go the way of Git LFS, not of Xet."""
    hub = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self._chunks() if "Transfer-Encoding" in self.headers else self.rfile.read(self._length())
            hub.tokens.add(self.headers.get("Authorization"))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _length(self) -> int:
            return int(self.headers.get("Content-Length") or 0)

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # http.server calls these names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in (("HF_HUB_OFFLINE", False), ("ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
