"""The chunked storage behind the Hub, as far as ``hf_xet`` uses it: xorbs in, shards in, reconstructions out.

A *xorb* is a run of compressed chunks; a *shard* says of which chunk ranges a file is made; a *reconstruction*
tells a reader which byte ranges of which xorbs to fetch. Layouts and routes follow xet-core's public OpenAPI
file; the second versions of the routes answer 404, upon which the client falls back to the first. Neither chunk
hashes nor file hashes are checked here; the SHA-256 that a shard announces is.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from deltahub.testing.repos import Refusal
from deltahub.testing.state import Route, State, route, text

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Xet", "Xorb", "xet_name"]

_SECTION_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30


def xet_name(raw: bytes) -> str:
    """A 32-byte hash as Xet writes it: four little-endian 64-bit words in hexadecimal."""
    return "".join(raw[at : at + 8][::-1].hex() for at in range(0, 32, 8))


def _ungroup(data: bytes) -> bytes:
    """Undo byte grouping by four: bytes 0, 4, 8 … were stored first, then 1, 5, 9 … and so on."""
    out, at = bytearray(len(data)), 0
    for phase in range(4):
        count = (len(data) - phase + 3) // 4
        out[phase::4] = data[at : at + count]
        at += count
    return bytes(out)


class Xorb:
    """Chunks one after the other, each with an eight-byte header, and perhaps a footer."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offsets = [0]
        at = 0
        while at + 8 <= len(data) and data[at : at + 7] != b"XETBLOB":
            at += 8 + int.from_bytes(data[at + 1 : at + 4], "little")
            self.offsets.append(at)

    def chunk(self, index: int) -> bytes:
        """The uncompressed bytes of one chunk."""
        import lz4.frame

        start, end = self.offsets[index], self.offsets[index + 1]
        scheme, size = self.data[start + 4], int.from_bytes(self.data[start + 5 : start + 8], "little")
        raw = self.data[start + 8 : end]
        if scheme in {1, 2}:
            raw = lz4.frame.decompress(raw)
        if scheme == 2:
            raw = _ungroup(raw)
        if len(raw) != size or scheme > 2:
            raise Refusal(400, f"chunk {index} does not have the announced length or compression")
        return raw


Term = tuple[str, int, int, int]
"""A xorb's name, the bytes taken from it, the first chunk, the chunk after the last."""


class Xet:
    """The content-addressed store. ``state.xet_names`` tells the rest of the Hub what arrived this way."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, list[Term]] = {}

    def routes(self) -> list[Route]:
        repo, cas = "/api/{kind}/{repo}", "/_cas"
        return [
            route("GET", repo + "/xet-read-token/{rest}", self.read_token),
            route("GET", repo + "/xet-write-token/{rest}", self.write_token),
            route("POST", cas + "/v1/xorbs/default/{sha}", self.put_xorb),
            route("POST", cas + "/v1/shards", self.put_shard),
            route("GET", cas + "/v1/reconstructions/{sha}", self.reconstruction),
            route("GET", "/xorb/{sha}", self.xorb, cdn=True),
            route("GET HEAD POST", cas + "/{path}", self.unknown),
        ]

    async def read_token(self, request: Request) -> object:
        self.state.repository(request, files=True)
        return self._token()

    async def write_token(self, request: Request) -> object:
        self.state.repository(request)
        self.state.account(request, required=True)
        return self._token()

    def _token(self) -> Response:
        expires, url = int(time.time()) + 3600, f"{self.state.url}/_cas"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"accessToken": "xet", "exp": expires, "casUrl": url}, headers=headers)

    async def put_xorb(self, request: Request) -> object:
        name = text(request, "sha")
        new = name not in self.xorbs
        self.xorbs[name] = Xorb(await request.body())
        return {"was_inserted": new}

    async def put_shard(self, request: Request) -> object:
        try:
            self.read_shard(await request.body())
        except (struct.error, IndexError, KeyError) as error:
            raise Refusal(400, f"bad shard: {error!r}") from None
        return {"result": 1}

    def read_shard(self, data: bytes) -> None:
        """Take in the file section of a shard and assemble every file whose SHA-256 it tells."""
        if data[:14] != b"HFRepoMetaData":
            raise Refusal(400, "bad shard magic")
        at = 48  # tag of 32 bytes, version, footer size
        while data[at : at + 32] != _SECTION_END:
            name = xet_name(data[at : at + 32])
            flags, count = struct.unpack_from("<II", data, at + 32)
            at += 48
            terms: list[Term] = []
            for _ in range(count):
                _, length, first, last = struct.unpack_from("<IIII", data, at + 32)
                terms.append((xet_name(data[at : at + 32]), length, first, last))
                at += 48
            if flags & _HAS_VERIFICATION:
                at += 48 * count
            self.files[name] = terms
            if flags & _HAS_METADATA:
                self._assemble(name, xet_name(data[at : at + 32]))
                at += 48

    def _assemble(self, name: str, sha256: str) -> None:
        terms = self.files[name]
        raw = b"".join(self.xorbs[xorb].chunk(n) for xorb, _, first, last in terms for n in range(first, last))
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise Refusal(400, "the content does not have the announced sha256")
        self.state.store.write(self.state.store.root / "lfs" / sha256, raw)
        self.state.xet_names[sha256] = name

    async def reconstruction(self, request: Request) -> object:
        """Which ranges of which xorbs make a range of a file."""
        terms = self.files.get(text(request, "sha"))
        if terms is None:
            raise Refusal(404, "no such file")
        size = sum(term[1] for term in terms)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        begin, end = (int(match[1]), int(match[2]) + 1) if match else (0, size)
        if begin >= size:
            raise Refusal(416, "range not satisfiable")
        kept, skipped = _covering(terms, begin, end)
        fetch: dict[str, list[dict[str, Any]]] = {}
        for xorb in dict.fromkeys(term[0] for term in kept):
            offsets, url = self.xorbs[xorb].offsets, f"{self.state.cdn_url}/xorb/{xorb}"
            fetch[xorb] = [
                {
                    "range": {"start": first, "end": last},
                    "url": url,
                    "url_range": {"start": offsets[first], "end": offsets[last] - 1},
                }
                for first, last in _merged(sorted((term[2], term[3]) for term in kept if term[0] == xorb))
            ]
        listed = [
            {"hash": xorb, "unpacked_length": length, "range": {"start": first, "end": last}}
            for xorb, length, first, last in kept
        ]
        return {"offset_into_first_range": skipped, "fetch_info": fetch, "terms": listed}

    async def xorb(self, request: Request) -> object:
        found = self.xorbs.get(text(request, "sha"))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if found is None or match is None:
            raise Refusal(404, "no such xorb, or no range asked for")
        begin, end = int(match[1]), int(match[2])
        headers = {"Content-Range": f"bytes {begin}-{end}/{len(found.data)}"}
        return Response(found.data[begin : end + 1], 206, headers, "application/octet-stream")

    async def unknown(self, request: Request) -> object:
        raise Refusal(404, f"{request.url.path} is not spoken here")


def _covering(terms: list[Term], begin: int, end: int) -> tuple[list[Term], int]:
    """The terms that hold bytes ``begin`` to ``end``, and how many bytes of the first come before ``begin``."""
    kept: list[Term] = []
    at = skipped = 0
    for term in terms:
        if at + term[1] > begin and at < end:
            if not kept:
                skipped = begin - at
            kept.append(term)
        at += term[1]
    return kept, skipped


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that overlap or touch: a reader looks for the one entry that holds a term."""
    out: list[tuple[int, int]] = []
    for first, last in ranges:
        if out and first <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], last))
        else:
            out.append((first, last))
    return out
