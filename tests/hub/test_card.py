"""The model card: what the Hub reads of it, what a person sees, what a user wrote, and what a stranger could plant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt

from deltahub.errors import HubError
from deltahub.hub import CardDetails, push, render_card, write_card
from deltahub.hub.card import BEGIN, END, split_card
from deltahub.manifest import Manifest
from deltahub.testing import LoopbackHub

Maker = Callable[..., Path]


@pytest.fixture
def manifest(make_package: Maker) -> Manifest:
    return Manifest.parse((make_package("for_cards") / "delta.json").read_bytes())


def changed(manifest: Manifest, **more: Any) -> Manifest:
    return Manifest.parse(json.dumps({**json.loads(manifest.to_bytes()), **more}).encode())


def test_the_card_of_a_new_package(manifest: Manifest) -> None:
    details = CardDetails(
        license="apache-2.0",
        language=("en",),
        datasets=("org/set",),
        metrics={"accuracy": 0.91234, "nan": float("nan")},
        evaluated_on="Docstrings | test",
        summary="Sorts sentences.",
        tags=("demo",),
    )
    text = render_card(manifest, repo_id="acme/delta", details=details, parameters={"attention": 128})
    card = ModelCard(text)  # the Hub's own reader
    assert card.data.library_name == "deltahub"
    assert card.data.base_model == "org/base"
    assert card.data["base_model_relation"] == "adapter"
    assert (card.data.license, card.data.datasets, card.data.language) == ("apache-2.0", ["org/set"], ["en"])
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results or []] == [
        ("Docstrings | test", "accuracy", 0.91234)
    ]
    root = manifest.backbone.identity.exact
    assert {"deltahub", "deltahub-kind-lora", f"deltahub-exact-{root[:16]}", "demo"} <= set(card.data.tags or [])
    for part in (
        "# delta\n\nSorts sentences.\n",
        'model = deltahub.load("acme/delta")',
        "layer.{0..1}.query  ← attention (lora)",
        "| `attention` | `lora 1` | rank = 4, scale = 2.0 | 2 | 128 |",
        "128 numbers, 864 bytes.",
        "| Docstrings \\| test | accuracy | 0.9123 |",
        f"| exact | `{root}` |",
    ):
        assert part in text, part


def test_it_renders_to_sound_html(manifest: Manifest) -> None:
    text = render_card(manifest, repo_id="acme/delta", parameters={"attention": 128})
    html = MarkdownIt("commonmark").enable("table").render(split_card(text)[1])
    assert html.count("<table>") == html.count("</table>") == 2
    assert '<code class="language-python">import deltahub' in html
    assert "└── layer.{0..1}.query  ← attention (lora)" in html
    rows = [row.count("<td") for row in html.split("<tr>")[1:] if "<td" in row]
    assert rows == [5, 2, 2, 2, 2, 2]


def test_a_users_words_are_kept(manifest: Manifest) -> None:
    first = render_card(manifest, repo_id="acme/delta", details=CardDetails(license="mit", metrics={"f1": 0.5}))
    edited = first.replace("license: mit", "license: apache-2.0\nwidget: [{text: hi}]")
    edited = edited.replace("# delta\n", "# My delta\n\nBefore.\n") + "\nAfter.\n"
    newer = changed(manifest, modules=[{**json.loads(manifest.to_bytes())["modules"][0], "config": {"rank": 9}}])
    second = render_card(newer, repo_id="acme/delta", existing=edited)
    assert "# My delta\n\nBefore.\n" in second
    assert second.endswith("\nAfter.\n")
    assert "rank = 9" in second
    assert "rank = 4" not in second
    assert "| unknown | f1 | 0.5 |" in second  # what only the first push knew
    kept, _ = split_card(second)
    assert (kept["license"], kept["widget"]) == ("apache-2.0", [{"text": "hi"}])
    assert render_card(newer, repo_id="acme/delta", existing=second) == second

    own = "# All mine\n\nNo markers here.\n"
    card = render_card(manifest, repo_id="acme/delta", existing=own)
    assert split_card(card)[1].startswith(own)
    assert split_card(card)[1].count(BEGIN) == split_card(card)[1].count(END) == 1


def test_stale_tags_go(manifest: Manifest) -> None:
    card = "---\ntags: [mine, deltahub-exact-0000000000000000, deltahub-kind-old, 5]\nbase_model: x/y\n---\n"
    metadata, _ = split_card(render_card(manifest, repo_id="a/b", existing=card))
    assert metadata["base_model"] == "org/base"
    assert "mine" in metadata["tags"]
    assert not {"deltahub-exact-0000000000000000", "deltahub-kind-old", 5} & set(metadata["tags"])


@pytest.mark.parametrize(
    "front",
    [
        "!!python/object/apply:os.system [echo]",
        "a: &a [x]\nb: [*a, *a]",
        "- a\n- b",
        "a: [",
        "x: " + "[" * 5000,
        "- " * 5000,
        "k: v\n" * 50_000,
        "when: 2020-99-99",
    ],
)
def test_metadata_that_is_no_plain_mapping(front: str) -> None:
    with pytest.raises(HubError) as caught:
        split_card(f"---\n{front}\n---\ntext")
    assert caught.value.code == "E_HUB_CARD"


def test_a_card_of_ten_megabytes() -> None:
    with pytest.raises(HubError, match="E_HUB_CARD"):
        split_card("---\na: b\n---\n" + "x" * (10 << 20))


def test_names_cannot_leave_their_places(manifest: Manifest) -> None:
    """A package may come from anybody; its names are text in the card, never markup."""
    module = json.loads(manifest.to_bytes())["modules"][0]
    hostile = [
        {**module, "name": "m", "config": {"rank": 1, "note": "<script>alert(1)</script> | [x](javascript:y)\n# h"}},
        {**module, "name": "n", "targets": ["a", "c"]},
    ]
    text = render_card(changed(manifest, modules=hostile), repo_id="acme/delta")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(split_card(text)[1])
    for bad in ("<script>", "<b>", 'href="javascript', "<h1>h"):
        assert bad not in html
    assert html.count("<pre>") == 2


def test_a_push_writes_it_and_keeps_it(hub: LoopbackHub, make_package: Maker) -> None:
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    folder = make_package()
    push(folder, "acme/delta", card=CardDetails(license="mit", metrics={"f1": 0.5}), **where)
    info = HfApi(endpoint=hub.url).model_info("acme/delta")
    assert info.library_name == "deltahub"
    assert "base_model:adapter:org/base" in (info.tags or [])
    mine = hub.read("acme/delta", "README.md").decode() + "\nMy words.\n"
    head = hub.commit("acme/delta", {"README.md": mine.encode()})
    assert push(folder, "acme/delta", **where).commit == head  # nothing of it would change
    push(make_package("second", rank=6), "acme/delta", **where)
    now = hub.read("acme/delta", "README.md").decode()
    assert now.endswith("\nMy words.\n")
    assert ("rank = 6" in now, "license: mit" in now, "| f1 | 0.5 |" in now) == (True, True, True)
    head = hub.commit("acme/delta", {"README.md": b"plain"})
    assert push(make_package("third", rank=6), "acme/delta", card=False, **where).commit == head
    (folder / "README.md").write_text("---\nlicense: 5\ntags: x\n---\n")
    with pytest.raises(HubError, match="E_HUB_CARD"):
        push(folder, "acme/delta", card=False, **where)


def test_a_card_written_first_is_what_is_pushed(hub: LoopbackHub, make_package: Maker) -> None:
    folder = make_package()
    path = write_card(folder, "acme/delta", details=CardDetails(license="mit"))
    path.write_text(path.read_text() + "\nMine.\n")
    assert write_card(folder, "acme/delta").read_text().endswith("\nMine.\n")
    push(folder, "acme/delta", endpoint=hub.url, token=hub.token)
    assert hub.read("acme/delta", "README.md") == path.read_bytes()
