"""The HTML report: whole, escaped, and in need of nothing from outside."""

import base64
import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from fastgn.analysis import report
from fastgn.analysis.report import html_report
from fastgn.analysis.statistics import gradient_statistics
from fastgn.analysis.tables import format_radius, wilson_interval
from fastgn.errors import UserError

VOID = {"meta", "img", "br", "wbr", "link", "hr", "input"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}

RECORD: dict[str, Any] = {
    "norm": "Linf",
    "eps_units": "0..1 pixels",
    "seed": 7,
    "ranks": 2,
    "batch_size": 360,
    "models": [
        {
            "name": "robust_net",
            "model": "swin_base",
            "method": "gradnorm",
            "images": 64,
            "subset": "first 64 of 360",
            "ids": [1001, 1002],
            "warnings": ["gradients of 3 images are zero"],
            "results": [
                {"attack": "clean", "eps": 0.0, "accuracy": 60 / 64, "seconds": 0.1},
                {"attack": "pgd-20", "eps": 4 / 255, "accuracy": 40 / 64, "seconds": 2.0},
                {"attack": "worst case", "eps": 4 / 255, "accuracy": 39 / 64, "seconds": 0.0},
            ],
            "statistics": {
                "mean_l1": 37.21,
                "count_failed": 24,
                "channel_l1_mean": [10.5, 12.5],
                "pgd10_fails": 40,
                "linearity": {"uniform": {"error": 0.25}},
                "l1": [1.0] * 5,
            },
            "sanity": [
                {"name": "falls with eps", "verdict": "pass", "detail": ""},
                {"name": "steps converge", "verdict": "warn", "detail": "62.5%, then 61%"},
                {"name": "white-box is stronger", "verdict": "fail", "detail": "see https://x.org"},
            ],
        },
        {
            "name": "plain",
            "model": "resnet",
            "method": "natural",
            "images": 64,
            "subset": "first 64 of 360",
            "ids": [],
            "warnings": [],
            "results": [
                {"attack": "clean", "eps": 0.0, "accuracy": 62 / 64, "seconds": 0.1},
                {"attack": "square", "eps": 4 / 255, "accuracy": 0.0, "seconds": 1.0},
            ],
        },
    ],
    "versions": {"python": "3.11.9", "torch": "2.11.0"},
    "commit": "0123456789ab-dirty",
    "hardware": {"cpu": "EPYC", "cpu_count": 16, "gpus": ["H100", "H100"]},
}
PICTURES = {"Curves & norms": b"\x89PNG\r\n\x1a\n\x00\xff<>", "Second": bytes(range(256))}


class Parsed(HTMLParser):
    """A page's tags, attributes, text and table rows; fails on a tag that is not closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.style = ""
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "small" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def values(self, tag: str, name: str) -> list[str]:
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


def parsed(record: dict[str, Any] = RECORD, title: str = "Two models") -> Parsed:
    return Parsed(html_report(record, PICTURES, title=title))


def bare() -> dict[str, Any]:
    """A record of nothing but what every evaluation has."""
    record = {"norm": "Linf", "models": copy.deepcopy(RECORD["models"][1:])}
    del record["models"][0]["warnings"]
    return record


def test_every_part_is_there() -> None:
    page = parsed()
    assert page.values("section", "id") == [
        *("accuracy", "statistics", "sanity", "pictures", "warnings", "about")
    ]
    assert page.values("html", "lang") == ["en"] and page.tags.count("h1") == 1
    for text in ("Two models", "first 64 of 360", "L∞", "4/255", "0123456789ab-dirty", "2 × H100"):
        assert text in page.text, text
    for text in ("torch 2.11.0", "EPYC", "gradients of 3 images are zero", "1 sanity check failed"):
        assert text in page.text, text


def test_every_accuracy_is_in_its_row_and_column() -> None:
    rows = parsed().rows
    assert rows[0] == ["attack", "ε", "robust_net swin_base gradnorm", "plain resnet natural"]
    assert rows[1] == ["clean", "", "93.8% 85.0–97.5", "96.9% 89.3–99.1"]
    assert rows[2] == ["pgd-20", "4/255", "62.5% 50.3–73.3", "–"]
    assert rows[3] == ["square", "4/255", "–", "0.0% 0.0–5.7"]
    assert rows[4] == ["worst case", "4/255", "60.9% 48.7–71.9", "–"], "the worst case comes last"


@pytest.mark.parametrize(
    ("eps", "shown"),
    [(4 / 255, "4/255"), (0.5 / 255, "0.5/255"), (0.025, "0.025"), (0.5, "0.5"), (1.0, "1")],
)
def test_radii(eps: float, shown: str) -> None:
    assert format_radius(eps) == shown


def test_statistics_show_numbers_and_skip_long_lists() -> None:
    page = parsed()
    assert ["mean L1", "37.21", "–"] in page.rows and ["count failed", "24", "–"] in page.rows
    assert ["mean L1 norm in green", "12.5", "–"] in page.rows
    assert ["images that withstand PGD-10", "40", "–"] in page.rows
    assert ["error of the linear loss at random points (nats)", "0.25", "–"] in page.rows
    assert not [row for row in page.rows if row[0] == "L1"] and "1001" not in page.text


def test_every_statistic_has_words() -> None:
    """What gradient_statistics returns of 4 images, so that lists over images are short too."""
    images, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 2)).eval()
    found = gradient_statistics(model, [(images, labels)], eps=0.01, seed=0)
    keys = {key for key, _ in report.flatten(found)}
    assert {"l1_mean", "linearity pgd10 error", "channel_l1_mean 2"} < keys
    assert keys - set(report.LABELS) == {"seed"}


def test_a_name_that_is_no_unicode_is_written() -> None:
    record = copy.deepcopy(RECORD)
    record["models"][0]["name"] = "run_\udcff$"
    assert "run_<wbr>?$" in html_report(record, {}, title="\udcff")


def test_verdicts_are_words() -> None:
    rows = parsed().rows
    assert ["pass", "falls with eps"] in rows
    assert ["warn", "steps converge62.5%, then 61%"] in rows
    assert ["robust_net 1 pass, 1 warn, 1 fail"] in rows


def test_pictures_are_embedded_byte_for_byte() -> None:
    page = parsed()
    prefix = "data:image/png;base64,"
    sources = page.values("img", "src")
    assert all(source.startswith(prefix) for source in sources)
    decoded = [base64.b64decode(s.removeprefix(prefix), validate=True) for s in sources]
    assert decoded == list(PICTURES.values())
    assert page.values("img", "alt") == list(PICTURES)


def test_nothing_is_loaded_from_outside() -> None:
    page = parsed()
    loads = [value for _, name, value in page.attributes if name in LOADS]
    assert all(value.startswith(("data:image/png;", "#")) for value in loads), loads
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "url(" not in page.style and "@import" not in page.style
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {h.removeprefix("#") for h in page.values("a", "href")} <= ids


def marked(item: Any) -> Any:
    """Markup in every string and key that a record's author may choose freely."""
    evil = "\"'><script>alert(1)</script>&amp;"
    if isinstance(item, dict):
        return {
            k + evil if k in ("mean_l1", "torch", "cpu") else k: v if k == "attack" else marked(v)
            for k, v in item.items()
        }
    if isinstance(item, list):
        return [marked(v) for v in item]
    return item + evil if isinstance(item, str) else item


def test_markup_in_the_record_stays_text() -> None:
    record = marked(RECORD)
    record["models"][1]["results"][1]["attack"] = "<script>square"
    caption = '<img src=x onerror="alert(1)">'
    page = Parsed(html_report(record, {caption: b"png"}, title="</title><script>$summary"))
    plain = parsed()
    assert set(page.tags) == set(plain.tags) and "script" not in page.tags
    assert page.tags.count("img") == 1 and page.values("img", "alt") == [caption]
    names = {name for _, name, _ in page.attributes}
    assert names == {name for _, name, _ in plain.attributes}
    assert "</title><script>$summary" in page.text and "<script>square" in page.text
    for text in ("robust_net", "swin_base", "steps converge", "EPYC", "torch", "fail", "mean l1"):
        assert f"{text}\"'><script>alert(1)</script>&amp;" in page.text, text


def test_what_the_record_lacks_is_left_out() -> None:
    page = Parsed(html_report(bare(), {}, title="Bare"))
    assert page.values("section", "id") == ["accuracy", "about"]
    assert page.tags.count("h2") == 2 and "Read first" not in page.text and "Seed" not in page.text
    assert "None" not in page.text


@pytest.mark.parametrize(
    "empty", [{"statistics": {"l1": [1.0] * 5}}, {"sanity": []}, {"warnings": []}]
)
def test_an_empty_part_has_no_heading(empty: dict[str, Any]) -> None:
    record = bare()
    record["models"][0] |= empty
    page = Parsed(html_report(record, {}, title="Bare"))
    assert page.values("section", "id") == ["accuracy", "about"]


def test_no_models_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no models"):
        html_report({"models": []}, {}, title="Nothing")


def test_wilson_by_hand() -> None:
    """z² = 3.84146: 0.5 over 100 is 0.5 ± 1.96 √(0.0025 + z²/40000) / (1 + z²/100); none of 10 is
    z² / (10 + z²) and below."""
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(4 / 255, "4/255"), (0.5 / 255, "0.5/255"), (0.0157, "0.0157"), (1.0, "1"), (0.0, "0")],
)
def test_radius(eps: float, text: str) -> None:
    assert format_radius(eps) == text


def test_dark_mode_phone_and_paper_have_their_rules() -> None:
    style = parsed().style
    for query in ("screen and (prefers-color-scheme: dark)", "(max-width: 36rem)", "print"):
        assert f"@media {query}" in style
    used, set_ = re.findall(r"var\((--\w+)\)", style), re.findall(r"(--\w+):", style)
    assert set(used) == set(set_)
