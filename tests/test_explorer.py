"""The explorer: a page that asks nobody for anything, served to one browser, and used in one.

The tests in a browser need chromium and chromedriver (`apt-get install chromium-driver`) and `pip install selenium`.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub import kinds
from deltahub.explorer import page, served
from deltahub.explorer.equations import as_mathml, equation_rows
from deltahub.inspecting import inspect
from tests.models import bert_classifier

ROOT = Path(__file__).resolve().parents[1]


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_needs_nothing_else() -> None:
    html = page(inspect(bert_classifier()))
    assert "{{" not in html
    assert not re.search(r"(?:src|href)=|url\(|import\s*\(|fetch\(", html)
    addresses = set(re.findall(r"https?://[^\s\"'<)\\]+", html))
    assert {
        a for a in addresses if not a.startswith(("http://www.w3.org/", "https://github.com", "https://arxiv"))
    } == set()
    data = data_of(html)
    assert data["root"]["c"]
    assert {kind["kind"] for kind in data["kinds"]} == set(kinds.names())


def test_a_name_cannot_leave_its_place() -> None:
    model = torch.nn.Module()
    model._modules["</script><script>alert(1)</script>"] = torch.nn.Linear(2, 2)
    html = page(inspect(model))
    assert "<script>alert" not in html
    assert data_of(html)["root"]["c"][0]["n"] == "</script><script>alert(1)</script>"


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("W + scale * up @ down", "<mspace"),
        ("a * b", "<mo>·</mo>"),
        ("a / (b + c)", "<mfrac>"),
        ("-(a + b) * c", "(</mo>"),
        ("x ** 2", "<msup>"),
        ("h = gelu(x)\nh + 1", "<mtr>"),
        ("W[0:2]", "W[0:2]"),
        ("not an < equation >", "&lt;"),
        ("b_out", "<msub>"),
    ],
)
def test_equations_are_typeset(text: str, holds: str) -> None:
    import xml.etree.ElementTree as ET

    found = as_mathml(text, left="y′")
    assert holds in found
    ET.fromstring(found)


def test_every_built_in_equation_is_typeset() -> None:
    for name in kinds.names():
        rows = equation_rows(kinds.get(name).document.source["equations"])
        assert rows
        assert all(entry["math"].startswith("<math") for entry in rows), name


def status(address: str, host: str | None = None) -> int:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_only_who_has_the_token_sees_it() -> None:
    with served("<p>page</p>") as address:
        assert address.startswith("http://127.0.0.1:")
        base = address.partition("?")[0]
        assert status(address) == 200
        assert status(base) == 403
        assert status(f"{base}?token=x") == 403
        assert status(f"{base}other{address.removeprefix(base)}") == 403
        assert status(address, host="evil.example") == 403
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


def test_equations_that_do_not_hold_are_left_out() -> None:
    equations = kinds.get("lora").document.source["equations"]
    assert {row["port"] for row in equation_rows(equations)} == {"output", "weight", "bias"}
    assert {row["port"] for row in equation_rows(equations, {"biased": False})} == {"output", "weight"}
    (bias,) = (row for row in equation_rows(equations, {"biased": True}) if row["port"] == "bias")
    assert bias["when"] == ""


def test_on_the_command_line(make_package: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_package()
    command = [sys.executable, "-m", "deltahub.cli"]
    html = tmp_path / "page.html"
    subprocess.run([*command, "inspect", folder, "--html", html], check=True, capture_output=True, cwd=ROOT)
    assert len(data_of(html.read_text(encoding="utf-8"))["histograms"]) == 2
    # A shell that starts the tests in the background has them ignore ^C, and so would the process here.
    attentive = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{attentive}; from deltahub.cli import main; main()"]
    with subprocess.Popen(
        [*command, "explore", folder, "--json"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as running:
        try:
            assert running.stdout
            lines = [running.stdout.readline() for _ in range(3)]
            assert status(json.loads("".join(lines))["address"]) == 200
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 0
        finally:
            running.kill()


# ------------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and find_spec("selenium")),
    reason="needs chromium, chromedriver and selenium on this machine",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield running
    running.quit()


def text_of(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text)


def choose(browser: Any, name: str, value: object) -> None:
    script = """
const input = document.getElementById(arguments[0]);
input.value = arguments[1];
input.dispatchEvent(new Event("input")); input.dispatchEvent(new Event("change"));
"""
    browser.execute_script(script, name, str(value))


def click(browser: Any, path: str, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    line = browser.find_element("css selector", f'[data-path="{path}"] .name')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", line)
    actions = ActionChains(browser)
    for key in keys:
        actions.key_down(key)
    actions.click(line)
    for key in keys:
        actions.key_up(key)
    actions.perform()


@pytest.mark.slow
@in_a_browser
def test_planning_a_delta(browser: Any) -> None:
    """Click, type, read back: what the page says is what attaching does."""
    from selenium.webdriver.common.keys import Keys

    model = bert_classifier()
    with served(page(inspect(model))) as address:
        browser.get(address)
        assert browser.get_log("browser") == []
        browser.find_element("id", "expand").click()
        query = "bert.encoder.layer.0.attention.self.query"
        click(browser, query)  # query, key and value are alike, and in two layers
        assert text_of(browser, "places") == "6"
        browser.find_element("css selector", f'[data-path="{query}"] .each').click()
        click(browser, query)
        assert text_of(browser, "places") == "2"
        click(browser, query.replace("query", "value"), Keys.CONTROL)
        choose(browser, "config-rank", 2)
        line, manifest = text_of(browser, "python"), json.loads(text_of(browser, "manifest"))
        assert manifest["targets"] == ["bert.encoder.layer.{0..1}.attention.self.{query,value}"]
        delta = eval(line.removeprefix("delta = "), {"deltahub": deltahub, "model": model})
        assert text_of(browser, "trainable") == f"{delta.num_parameters():,}"
        assert text_of(browser, "places") == str(len(delta.sites))
        delta.detach()

        # One of them alone; and all that a search finds.
        browser.find_element("css selector", '[data-path="bert.encoder.layer.0"] .each').click()
        click(browser, "bert.encoder.layer.1")
        assert "cannot host lora" in text_of(browser, "problem")
        search = browser.find_element("id", "search")
        search.send_keys("classifier", Keys.ENTER)
        assert json.loads(text_of(browser, "manifest"))["targets"] == ["classifier"]
        shown = [e.text for e in browser.find_elements("css selector", "#tree .name")]
        assert shown == ["transformers.BertForSequenceClassification", "classifier"]
        search.send_keys(Keys.CONTROL, "a")
        search.send_keys(Keys.DELETE)

        # Shift-click takes what lies between, as far as it can host the kind.
        click(browser, "bert.embeddings.word_embeddings")
        click(browser, "bert.embeddings.LayerNorm", Keys.SHIFT)
        assert json.loads(text_of(browser, "manifest"))["targets"] == [
            "bert.embeddings.{word_embeddings,position_embeddings,token_type_embeddings}"
        ]
        click(browser, "classifier")
        assert text_of(browser, "places") == "1"
        check_every_kind(browser, model)


def check_every_kind(browser: Any, model: torch.nn.Module) -> None:
    """The page's own arithmetic of shapes against Python's, for every kind that a linear layer hosts."""
    from deltahub.errors import KindError
    from deltahub.hosts import view_of

    host = view_of(model.classifier).shape(model.classifier, torch.nn.Linear)
    compared = 0
    for name in kinds.names():
        kind = kinds.get(name)
        if "linear" not in kind.hosts:
            continue
        choose(browser, "kind", name)
        said = text_of(browser, "problem")
        if said:
            continue
        config = json.loads(text_of(browser, "manifest"))["config"]
        try:
            specs = kind.tensors(kind.check_config(config), host)
        except KindError:
            continue
        count = sum(
            torch.Size(spec.shape).numel() for spec in specs.values() if spec.trainable and spec.dtype == "float"
        )
        assert text_of(browser, "trainable") == f"{count:,}", name
        compared += 1
    assert compared >= 5


@pytest.mark.slow
@in_a_browser
def test_a_package_in_a_browser(browser: Any, tmp_path: Path) -> None:
    model = bert_classifier()
    delta = deltahub.attach(model, "lora", ["query", "value"], rank=2)
    for tensor in delta.parameters():
        torch.nn.init.normal_(tensor)
    delta.save(tmp_path / "delta")
    (tmp_path / "page.html").write_text(page(inspect(tmp_path / "delta")), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.find_element("css selector", "#package figcaption").text.startswith("lora/…/down: 256")
    bars = browser.find_elements("css selector", "#package svg rect")
    assert len(bars) == 2 * 48
    assert browser.find_elements("css selector", "#package math")
    assert not browser.find_element("id", "plan").is_displayed()
    browser.find_element("id", "expand").click()
    assert browser.find_elements("css selector", "#tree .badge")
