"""Packages in object stores, by the real clients: ``s3://`` against moto's server, ``gs://`` against a few lines here.

Runs where s3fs and moto, or gcsfs, are installed: ``pip install s3fs 'moto[server]' gcsfs``. What both have in common
with every other mirror is tested on ``file://``, ``memory://`` and HTTP, in ``test_mirrors.py``.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from deltahub.errors import DeltaHubError
from deltahub.hub import lock_of, pull

Maker = Callable[..., Path]
needs_s3 = pytest.mark.skipif(not (find_spec("s3fs") and find_spec("moto")), reason="needs s3fs and moto[server]")
needs_gs = pytest.mark.skipif(not find_spec("gcsfs"), reason="needs gcsfs")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that the tests do not otherwise meet


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """A bucket, and how to put something into it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem()
    client.mkdir("bucket")
    yield lambda name, data: client.pipe(f"bucket/{name}", data)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """As much of Google's storage as reading takes."""
    monkeypatch.setenv(
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # else it asks what kind of bucket this is, by gRPC
    import gcsfs

    objects: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            name = unquote(asked.path.partition("/o/")[2])
            data = objects.get(name)
            status, body = 200, b""
            if data is None:
                listing = not name and asked.path.endswith("/o")
                status, body = (200, b'{"items": []}') if listing else (404, b'{"error": {"code": 404}}')
            elif "alt=media" in asked.query or asked.path.startswith("/download"):
                low, _, high = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
                body = data[int(low) : int(high) + 1 if high else None]
                status = 206 if self.headers.get("Range") else 200
            else:
                item = {"name": name, "bucket": "bucket", "size": str(len(data)), "generation": "1"}
                body = json.dumps({**item, "selfLink": self.path, "mediaLink": self.path}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
        monkeypatch.setattr("fsspec.config.conf", {"gs": {"token": "anon"}, "gcs": {"token": "anon"}})
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield objects.__setitem__
        gcsfs.GCSFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param("s3", marks=needs_s3), pytest.param("gs", marks=needs_gs)])
def test_an_object_store(scheme: str, request: pytest.FixtureRequest, make_package: Maker, cache: Path) -> None:
    put: Callable[[str, bytes], None] = request.getfixturevalue(scheme)
    folder = make_package(rank=64, size=2048, shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, data in files.items():
        put(f"deltas/one/{name}", data)
    put("deltas/one/pytorch_model.bin", b"never fetched")
    url = f"{scheme}://bucket/deltas/one"
    options: dict[str, Any] = {"cache_dir": cache}
    found = pull(url, **options)
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == files
    assert pull(url, lock=lock_of(found), **options) == found
    assert pull(url, local_files_only=True, **options) == found

    def code(source: str, **more: Any) -> str:
        with pytest.raises(DeltaHubError) as caught:
            pull(source, **{**options, **more})
        return caught.value.code

    assert code(f"{scheme}://bucket/nothing") == "E_HUB_NOT_A_PACKAGE"
    name = "delta-00001-of-00002.safetensors"
    put(f"deltas/one/{name}", files[name][:-1] + b"\xff")
    assert code(url, cache_dir=cache / "other") == "E_HUB_DIGEST"
    assert pull(url, local_files_only=True, **options) == found
