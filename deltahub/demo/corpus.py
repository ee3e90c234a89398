"""Real text that every Python carries: the first sentences of the standard library's docstrings, by chapter.

The label of a sentence is the chapter of the library's reference that describes its module. The split is by a digest
of the sentence itself, so that it is the same on every machine with the same Python; equal sentences are one sentence,
and those that two chapters share are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["CHAPTERS", "Corpus", "Sentence", "collect", "first_sentence"]

CHAPTERS: Mapping[str, str] = {
    "text and bytes": "string re difflib textwrap unicodedata stringprep struct codecs",
    "data types": "datetime zoneinfo calendar collections collections.abc heapq bisect array weakref types copy pprint"
    " reprlib enum graphlib",
    "numeric and functional": "numbers math cmath decimal fractions random statistics itertools functools operator",
    "files and archives": "pathlib posixpath stat filecmp tempfile glob fnmatch linecache shutil fileinput"
    " zlib gzip bz2 lzma zipfile tarfile",
    "persistence and formats": "pickle copyreg shelve marshal dbm sqlite3 csv configparser tomllib netrc plistlib",
    "operating system": "os io time logging logging.config logging.handlers platform ctypes argparse getpass",
    "concurrency": "threading multiprocessing multiprocessing.pool multiprocessing.managers multiprocessing.context"
    " multiprocessing.synchronize multiprocessing.shared_memory concurrent.futures subprocess sched queue contextvars",
    "networking": "asyncio asyncio.base_events asyncio.streams asyncio.queues asyncio.locks asyncio.transports"
    " asyncio.protocols asyncio.events asyncio.tasks asyncio.futures socket ssl select selectors signal mmap",
    "internet data": "email.message email.header email.policy email.parser email.headerregistry email.charset"
    " email.utils email.generator json json.decoder json.encoder mailbox mimetypes base64 binascii quopri",
    "internet protocols": "urllib.request urllib.parse urllib.error urllib.robotparser http http.client http.server"
    " http.cookies http.cookiejar ftplib poplib imaplib smtplib uuid socketserver xmlrpc.client xmlrpc.server"
    " ipaddress wsgiref.handlers wsgiref.headers wsgiref.util webbrowser",
    "markup": "html html.parser xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax.handler"
    " xml.sax.xmlreader xml.sax.saxutils xml.sax.expatreader",
    "development": "typing pydoc doctest unittest unittest.case unittest.mock unittest.loader unittest.suite"
    " unittest.result bdb faulthandler pdb timeit trace tracemalloc cProfile pstats",
    "runtime": "sys builtins warnings dataclasses contextlib abc atexit traceback gc inspect site sysconfig codeop"
    " code",
    "language and importing": "ast symtable token tokenize tabnanny pyclbr dis pickletools compileall py_compile"
    " importlib importlib.abc importlib.machinery importlib.resources importlib.metadata importlib.util zipimport"
    " pkgutil runpy modulefinder",
}
"""Chapters of the library's reference, small neighbours together, and their modules: importing one does nothing."""

_LONGEST = 240
_FEWEST_WORDS = 4
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*")
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"'`])")


@dataclass(frozen=True, kw_only=True, order=True, slots=True)
class Sentence:
    """One example: where it stands, what it says, and the chapter it belongs to."""

    text: str
    chapter: str
    origin: str

    @property
    def held_out(self) -> bool:
        """Whether it is for testing: one sentence in four, by its digest."""
        return hashlib.sha256(self.text.casefold().encode()).digest()[0] < 64


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Sentences with labels, split for training and testing.

    Attributes:
        chapters: names of the classes; a label is a place in this list.
        train: sentences to learn from.
        test: sentences that are in nobody's training.
        missing: modules that this Python does not have.
    """

    chapters: Sequence[str]
    train: Sequence[Sentence]
    test: Sequence[Sentence]
    missing: Sequence[str]

    def labels(self, sentences: Sequence[Sentence]) -> list[int]:
        place = {chapter: i for i, chapter in enumerate(self.chapters)}
        return [place[sentence.chapter] for sentence in sentences]

    def write(self, path: Path) -> None:
        """Keep the corpus for other processes: libraries that are imported later may change what they would find."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Corpus:
        """The corpus that :meth:`write` kept."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        for half in ("train", "test"):
            kept[half] = [Sentence(**sentence) for sentence in kept[half]]
        return cls(**kept)

    def balance(self) -> dict[str, tuple[int, int]]:
        """Sentences for training and for testing of each chapter."""
        train, test = (Counter(s.chapter for s in half) for half in (self.train, self.test))
        return {chapter: (train[chapter], test[chapter]) for chapter in self.chapters}


def first_sentence(docstring: object) -> str | None:
    """The first sentence of a docstring, on one line; ``None`` where there is nothing to learn from.

    A leading call signature, as builtins have it, is not a sentence and is passed over.
    """
    if not isinstance(docstring, str):
        return None
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        lines = paragraph.splitlines()
        while lines and _SIGNATURE.match(lines[0]):
            lines = lines[1:]
        text = _END.split(" ".join(" ".join(lines).split()))[0][:_LONGEST]
        if len(text.split()) >= _FEWEST_WORDS:
            return text
    return None


def _documented(name: str, module: object) -> Iterator[tuple[str, object]]:
    """A module and what it defines itself: functions, classes, and their methods and properties."""
    yield name, module
    family = name.split(".", maxsplit=1)[0]
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not str(getattr(value, "__module__", None)).lstrip("_").startswith(family):
            continue
        yield f"{name}.{key}", value
        if inspect.isclass(value):
            for member, inner in sorted(vars(value).items()):
                # Other libraries hang methods of their own on the standard library's classes.
                if not member.startswith("_") and _own(inner, family):
                    yield f"{name}.{key}.{member}", inner


def _own(value: object, family: str) -> bool:
    return str(getattr(value, "__module__", None) or family).lstrip("_").startswith((family, "builtins"))


def _sentences(chapter: str, name: str) -> Iterator[Sentence]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # some names are deprecated, and say so when they are looked at
        module = importlib.import_module(name)
        found = [(origin, getattr(value, "__doc__", None)) for origin, value in _documented(name, module)]
    for origin, docstring in found:
        text = first_sentence(docstring)
        if text is not None:
            yield Sentence(text=text, chapter=chapter, origin=origin)


def collect(chapters: Mapping[str, str] = CHAPTERS) -> Corpus:
    """Gather the corpus from the running interpreter.

    Args:
        chapters: module names, separated by spaces, of each chapter.
    """
    found: dict[str, list[Sentence]] = {}
    missing: list[str] = []
    for chapter, names in chapters.items():
        for name in names.split():
            try:
                for sentence in _sentences(chapter, name):
                    found.setdefault(sentence.text.casefold(), []).append(sentence)
            except ImportError:
                missing.append(name)
    clear = [same[0] for same in found.values() if len({s.chapter for s in same}) == 1]
    return Corpus(
        chapters=list(chapters),
        train=sorted(s for s in clear if not s.held_out),
        test=sorted(s for s in clear if s.held_out),
        missing=missing,
    )
