"""A stand-in for the model hub: one model, read from a folder, in the hub's own protocol.

    python hub.py NAME FOLDER PORT

Answers what huggingface_hub asks for a download (facts of the model, its list of files, and each
file whole or in ranges) and 404 to everything else. Needs the standard library only.
"""

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """`name` is the model's, `folder` where its files lie."""

    protocol_version = "HTTP/1.1"
    name: str
    folder: Path

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        about = f"/api/models/{self.name}"
        if path == about or path.startswith(f"{about}/revision/"):
            self._json(self._facts())
        elif re.fullmatch(f"{re.escape(about)}/tree/[^/]+/?", path):
            self._json(self._tree())
        elif match := re.fullmatch(f"/{re.escape(self.name)}/resolve/[^/]+/([^/]+)", path):
            self._file(self.folder / match[1])
        else:
            self._missing("RepoNotFound")

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def _facts(self) -> dict[str, object]:
        files = [{"rfilename": path.name} for path in self._files()]
        return {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": files, "tags": []}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _tag(path)}
            for path in self._files()
        ]

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._headers(200, len(body), {"Content-Type": "application/json"})
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        size = path.stat().st_size
        headers = {"ETag": f'"{_tag(path)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, size - 1
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._headers(206 if wanted else 200, last + 1 - first, headers)
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(first)
                self._copy(file, last + 1 - first)

    def _copy(self, file: BinaryIO, length: int) -> None:
        """`length` bytes; the client may ask for less than the rest of the file."""
        while length and (piece := file.read(min(length, 1 << 20))):
            self.wfile.write(piece)
            length -= len(piece)

    def _missing(self, code: str) -> None:
        self._headers(404, 0, {"X-Error-Code": code})

    def _headers(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"X-Repo-Commit": COMMIT}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _tag(path: Path) -> str:
    return hashlib.sha1(f"{path.name} {path.stat().st_size}".encode()).hexdigest()


def main() -> None:
    Hub.name, Hub.folder = sys.argv[1], Path(sys.argv[2])
    ThreadingHTTPServer(("", int(sys.argv[3])), Hub).serve_forever()


if __name__ == "__main__":
    main()
