"""Runs a local server that speaks Google Cloud Storage's protocol and keeps objects in memory.

gcsfs finds the server through STORAGE_EMULATOR_HOST, and Orbax's TensorStore through
TENSORSTORE_GCS_HTTP_URL. The server implements the part of the JSON API that these two use:
https://cloud.google.com/storage/docs/json_api.

python -m tests.helpers.bucket_server PORT
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.paths import ROOT

BUCKET = "bucket"


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Starts the server; yields the environment variables with its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.helpers.bucket_server", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.05)
        address = f"http://127.0.0.1:{port}"
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            # otherwise gcsfs asks Google for the bucket's type
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        process.kill()
        process.wait()


@dataclasses.dataclass
class Object:
    data: bytes
    generation: int
    updated: str

    def describe(self, name: str) -> dict[str, str]:
        about = {"name": name, "bucket": BUCKET, "size": len(self.data)}
        about |= {"generation": self.generation, "metageneration": 1}
        about |= {"updated": self.updated, "timeCreated": self.updated}
        return {"kind": "storage#object", **{key: str(value) for key, value in about.items()}}


class Failure(Exception):
    def __init__(self, status: int):
        self.status = status


class Store:
    """Holds the bucket's objects and unfinished uploads."""

    def __init__(self):
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.numbers, self.lock = itertools.count(1), threading.Lock()

    def check(self, name: str, query: dict[str, str]) -> Object | None:
        """Returns the existing object or None, if the request's preconditions hold."""
        there = self.objects.get(name)
        generation = 0 if there is None else there.generation
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Failure(412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Failure(304)
        return there

    def get(self, name: str, query: dict[str, str]) -> Object:
        if (there := self.check(name, query)) is None:
            raise Failure(404)
        return there

    def put(self, name: str, query: dict[str, str], data: bytes) -> dict[str, str]:
        with self.lock:
            self.check(name, query)
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.objects[name] = Object(bytes(data), next(self.numbers), now)
            return self.objects[name].describe(name)

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self.lock:
            self.get(name, query)
            del self.objects[name]

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for name, there in sorted(self.objects.items()):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(there.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms between headers and body
    store = Store()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body, headers = (
                json.dumps(body).encode(),
                {"Content_Type": "application/json"} | headers,
            )
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            self.route(url.path, query, body)
        except Failure as failure:
            error = {"error": {"code": failure.status, "message": str(failure.status)}}
            self.answer(failure.status, error)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path.startswith("/batch/"):
            return self.batch(body)
        match = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if match is None or unquote(match[2]) != BUCKET:
            raise Failure(404)
        kind, name = match[1], unquote(match[3] or "")
        if kind == "upload":
            return self.upload(query, body)
        if self.command == "DELETE":
            self.store.delete(name, query)
            return self.answer(204)
        if self.command == "POST":
            source, verb, target = re.split(rf"/(rewrite|move)To(?:/b/{BUCKET})?/o/", name)
            about = self.store.put(target, {}, self.store.get(source, {}).data)
            if verb == "rewrite":
                return self.answer(200, {"done": True, "resource": about})
            self.store.delete(source, {})
            return self.answer(200, about)
        if not name:
            listing = re.search(r"/o/?$", path)
            return self.answer(200, self.store.list(query) if listing else {"name": BUCKET})
        found = self.store.get(name, query)
        if query.get("alt") != "media" and kind != "download":
            return self.answer(200, found.describe(name))
        generation = {"x_goog_generation": str(found.generation)}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            size = len(found.data)
            start = int(match[1]) if match[1] else max(0, size - int(match[2]))
            stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
            if start >= size:
                raise Failure(416)
            where = f"bytes {start}-{stop - 1}/{size}"
            return self.answer(206, found.data[start:stop], Content_Range=where, **generation)
        self.answer(200, found.data, **generation)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        kind, uploads = query.get("uploadType"), self.store.uploads
        if kind == "media":
            return self.answer(200, self.store.put(query["name"], query, body))
        if kind == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            first, _, rest = body.partition(b"--" + mark)[2].partition(b"--" + mark)
            about, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (first, rest))
            data = re.sub(rb"\r?\n--" + re.escape(mark) + rb"--\s*\Z", b"", data)
            return self.answer(200, self.store.put(json.loads(about)["name"], query, data))
        if "session" not in query:
            session = str(next(self.store.numbers))
            name = query.get("name") or json.loads(body)["name"]
            uploads[session] = name, query, bytearray()
            where = (
                f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?session={session}"
            )
            return self.answer(200, {}, Location=where)
        name, wanted, data = uploads[query["session"]]
        data += body
        if (self.headers["Content-Range"] or "").endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        self.answer(200, self.store.put(name, wanted, bytes(data)))

    def batch(self, body: bytes) -> None:
        parts = []
        for name in re.findall(rf"DELETE /storage/v1/b/{BUCKET}/o/(\S+) HTTP", body.decode()):
            try:
                self.store.delete(unquote(name.partition("?")[0]), {})
                parts.append("HTTP/1.1 204 No Content")
            except Failure as failure:
                parts.append(f'HTTP/1.1 {failure.status}\n\n{{"error": {{}}}}')
        text = "".join(f"--mark\nContent-Type: application/http\n\n{part}\n\n" for part in parts)
        kind = "multipart/mixed; boundary=mark"
        self.answer(200, f"{text}--mark--".encode(), Content_Type=kind)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
