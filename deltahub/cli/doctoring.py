"""``deltahub doctor``."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterable
from typing import Any

from deltahub.cli.base import Endpoint, Json, Offline, app, as_bytes, as_table, show


@app.command()
def doctor(endpoint: Endpoint = None, offline: Offline = False, as_json: Json = False) -> None:
    """Say what is installed here, what it can do, and what is missing."""
    from deltahub.doctor import doctor as run

    show(run(endpoint=endpoint, offline=offline), as_json, _lines)


def _lines(found: Any) -> Iterable[str]:
    yield from as_table(
        [
            ("deltahub", found.deltahub),
            ("python", found.python),
            ("system", found.system),
            ("devices", ", ".join(found.devices)),
            ("onnxruntime", ", ".join(found.providers) or "not installed"),
            ("hub", f"{found.endpoint} ({found.answer}), {'a' if found.account else 'no'} token at hand"),
            *(
                ("cache", f"{folder} ({f'{as_bytes(free)} free' if free >= 0 else 'cannot be written'})")
                for folder, free in found.caches.items()
            ),
        ]
    )
    yield ""
    yield from as_table((part.name, part.version or "not installed") for part in found.parts)
    yield ""
    yield from as_table(
        (
            extra.name,
            "installed" if not extra.missing else f'pip install "deltahub[{extra.name}]"',
            extra.adds + (f" (missing: {', '.join(extra.missing)})" if extra.missing else ""),
        )
        for extra in found.extras
    )
    yield ""
    yield from (f"PROBLEM: {problem}" for problem in found.problems)
    if not found.problems:
        yield "nothing is wrong"
