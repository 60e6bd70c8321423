"""The browser of features in headless Chromium: what is sought, sorted, shown and pressed, from the file system."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_folder import HOSTILE, PLAIN

from crosscoder.browser.tokens import HIDDEN, visible

SHOWN = "[...document.querySelectorAll('.row')].map((row) => +row.querySelector('.number').textContent)"


@pytest.fixture(scope="session")
def features(folder):
    return pq.read_table(folder.parent / "features.parquet").to_pylist()


def rows(page):
    """The numbers of the features at the top of the list."""
    return page.ask(SHOWN)


def settled(page, count):
    """Wait until so many features are listed."""
    page.wait(f"document.getElementById('count').textContent.startsWith('{count:,} ')")


def shown_feature(page, feature):
    page.wait(f"document.querySelector('h1')?.textContent === 'Feature {feature}'")


def test_the_first_page_lists_and_draws_every_feature(page, features):
    settled(page, 300)
    by_rate = sorted(range(300), key=lambda one: (-features[one]["rate"], one))
    assert rows(page)[:12] == by_rate[:12]
    assert "263 are alive" in page.ask("document.getElementById('page').textContent")
    page.wait("document.querySelector('canvas')?.width > 300")
    is_drawn = "(() => { const c = document.querySelector('canvas'); return c.getContext('2d')"
    assert page.ask(is_drawn + ".getImageData(0, 0, c.width, c.height).data.some((one) => one > 0); })()")


def test_hostile_tokens_are_shown_as_text(page):
    for number, text in enumerate(HOSTILE):
        page.open_hash(f"#feature={number if number % 8 != 7 else number + len(HOSTILE + PLAIN)}")
        shown_feature(page, number if number % 8 != 7 else number + len(HOSTILE + PLAIN))
        peak = page.ask("document.querySelector('.tok.peak').textContent")
        assert peak == visible(text)
        assert not any(unicodedata.category(one) in HIDDEN for one in peak)
    whole = page.ask("document.documentElement.textContent")
    assert not any(one in whole for one in "\u202e\u202c\x1b\x07\u200b\ufeff\u2028")
    assert page.ask("document.querySelectorAll('img, script[src*=alert], [onerror], a[href^=javascript]').length") == 0
    assert page.ask(
        "[...document.scripts].every((one) => /^(browser|data-[a-z0-9]+)\\.js$/.test(one.getAttribute('src')))"
    )
    page.press("l")
    page.wait("document.querySelector('.grid')")


def test_a_token_finds_what_peaks_on_it_or_promotes_it(page, folder, features):
    page.press("/")
    page.type("PRESIDENT")
    found_by = {
        row["feature"]: [*row["peak_tokens"], *(row["effects"][-1]["promoted"] if row["effects"] else [])]
        for row in features
    }
    wanted = {one for one, texts in found_by.items() if any("president" in text.lower() for text in texts)}
    settled(page, len(wanted))
    found = rows(page)
    assert set(found) <= wanted
    assert " president" in found_by[found[0]]  # whole tokens go before parts of others
    page.press("Escape")
    settled(page, 300)
    page.press("/")
    page.type('" president"')  # in quotation marks: that token and no other
    page.wait("document.getElementById('count').textContent.includes('“\" president\"”')")
    assert set(rows(page)) <= {one for one, texts in found_by.items() if " president" in texts}
    page.press("Escape")


@pytest.mark.parametrize(("query", "first", "count"), [("#42", 42, 1), ("42", 42, None), ("nowhere at all", None, 0)])
def test_a_number_finds_its_feature_and_what_is_nowhere_finds_none(page, query, first, count):
    page.press("/")
    page.type(query)
    page.wait("document.getElementById('count').textContent.includes('with “')")
    found = rows(page)
    assert (found[0] if found else None) == first
    assert count is None or len(found) == count
    if first is not None:
        page.press("Enter")
        shown_feature(page, first)


@pytest.mark.parametrize("key", ["rate", "spread", "use", "stability", "density", "number"])
def test_sorting_and_turning_the_order(page, features, key):
    value = {row["feature"]: row["feature"] if key == "number" else row[key] for row in features}
    page.ask(f"const s = document.getElementById('sort'); s.value = '{key}'; s.dispatchEvent(new Event('change'))")
    page.wait(f"location.hash.includes('sort={key}')" if key != "rate" else "true")
    for turn in (-1, 1):
        known = [one for one, number in value.items() if number is not None]
        wanted = sorted(known, key=lambda one, turn=turn: (turn * np.float32(value[one]), one))[:10]
        page.wait(f"JSON.stringify({SHOWN}.slice(0, 10)) === '{json.dumps(wanted, separators=(',', ':'))}'")
        page.press("r")


def test_filters_leave_what_is_within_them(page, features):
    page.press("f")
    low, high = 0.04, 2.5
    for key, end, value in (("rate", 0, "4%"), ("spread", 1, str(high))):
        field = f"document.querySelector('[data-key={key}][data-end=\"{end}\"]')"
        page.ask(f"{field}.value = '{value}'; {field}.dispatchEvent(new Event('change'))")
    wanted = [one for one in features if one["rate"] >= low and one["spread"] <= high]
    settled(page, len(wanted))
    assert 0 < len(wanted) < 300
    assert "rate=0.04.." in page.ask("location.hash")
    page.click("#count a")
    settled(page, 300)


def test_a_link_shows_what_was_seen(page, folder):
    page.open(folder, "#feature=5&sort=spread&dir=up&q=river&rate=0.01..")
    shown_feature(page, 5)
    assert page.ask("document.getElementById('sort').value") == "spread"
    assert page.ask("document.getElementById('query').value") == "river"
    page.press("j")
    page.wait("location.hash.includes('sort=spread') && !location.hash.includes('feature=5&')")
    for wrong in ("#feature=300", "#feature=-1", "#feature=x&sort=none", "#rate=a..b&dir=sideways"):
        page.open(folder, wrong)
        settled(page, 300)
        assert not page.ask("document.querySelector('h1')?.textContent").startswith("Feature ")


def test_a_feature_s_page_says_what_the_data_say(page, folder, features):
    one = features[21]
    page.open(folder, "#feature=21")
    shown_feature(page, 21)
    text = page.ask("document.getElementById('page').textContent")
    assert f"{100 * one['rate']:.2f}%" in text
    for heading in ("Strongest examples", "Effect on the next token", "Examples of each quantile", "Nearest features"):
        assert heading in text
    examples = pq.read_table(folder.parent / "examples.parquet", filters=[("feature", "==", 21)]).to_pylist()
    counted = page.ask("document.querySelectorAll('.example').length")
    assert counted == len(examples) > 12
    first = next(one for one in examples if one["kind"] == "strongest" and one["rank"] == 0)
    shown = page.ask("[...document.querySelector('.example p').children].map((one) => one.textContent)")
    assert shown == [visible(token) for token in first["tokens"]]
    unread = page.ask(
        "[...document.querySelector('.example p').children].map((one) => one.classList.contains('unread'))"
    )
    assert unread == [value is None or np.isnan(value) for value in first["activations"]]
    assert page.ask("[...document.querySelectorAll('.up .chip')].map((one) => one.title.match(/\\d+/)[0])")
    promoted = page.ask("[...document.querySelectorAll('.up .amount')].map((one) => +one.textContent)")
    assert promoted == pytest.approx(one["effects"][-1]["promotion"], abs=6e-3)
    assert page.ask("document.querySelectorAll('.charts svg').length") == 4
    assert page.ask("document.querySelectorAll('.charts rect.norm').length") == 4
    page.press("[")  # the last layer's row
    page.wait(
        "[...document.querySelectorAll('.tabs [aria-pressed=true]')].some((one) => one.textContent === 'layer 8')"
    )
    assert "seed <b>1</b>" in text
    page.click(".near a")
    page.wait("location.hash.includes('feature=22')")


def test_a_feature_that_is_never_active_says_so(page, folder):
    page.open(folder, "#feature=7")
    shown_feature(page, 7)
    text = page.ask("document.getElementById('page').textContent")
    assert "Never active on the tokens that were read." in text
    assert "not known for features that were never active" in text


def test_everything_can_be_done_by_keys(page, features):
    order = sorted(range(300), key=lambda one: (-features[one]["rate"], one))
    page.press("j")
    shown_feature(page, order[0])
    page.press("j")
    shown_feature(page, order[1])
    page.press("k")
    shown_feature(page, order[0])
    page.press("l")
    page.wait("document.querySelectorAll('.grid').length === 3")
    page.press("?")
    page.wait("document.getElementById('help').open")
    page.press("Escape")
    page.wait("!document.getElementById('help').open")
    page.press("s")
    page.wait("location.hash.includes('sort=largest')")
    page.press("o")
    page.wait("document.querySelector('canvas')")
    page.press("Escape")
    page.press("/")
    assert page.ask("document.activeElement.id") == "query"
    page.type("law")
    page.wait("location.hash.includes('q=law')")
    page.press("Enter")
    page.wait("document.querySelector('h1')?.textContent.startsWith('Feature ')")


def test_a_long_list_is_scrolled_and_the_chosen_stays_in_sight(page):
    page.ask("document.getElementById('list').scrollTop = 6000")
    page.wait(f"{SHOWN}.length > 10 && {SHOWN}[0] !== undefined && document.querySelector('.row').ariaPosInSet > 100")
    place = page.ask("+document.querySelectorAll('.row')[6].ariaPosInSet")
    page.click(".row:nth-of-type(8)")
    page.wait("document.querySelector('h1')?.textContent.startsWith('Feature ')")
    for _ in range(30):
        page.press("j")
    page.wait(f"document.querySelector('.row[aria-selected=true]')?.ariaPosInSet > {place + 20}")
    box = "document.querySelector('.row[aria-selected=true]').getBoundingClientRect()"
    assert page.ask(f"{box}.bottom <= innerHeight + 1 && {box}.top >= 0")


@pytest.mark.parametrize("hash", ["", "#map", "#feature=3"])
def test_it_fits_a_phone(page, folder, hash):
    page.resize(390, 844)
    page.open(folder, hash)
    page.wait("document.querySelector('h1') && document.querySelector('.row')")
    assert page.ask("document.documentElement.scrollWidth") <= 390
    assert page.ask("document.getElementById('page').scrollWidth") <= 390
    seen = "(one) => one.getBoundingClientRect().width > 0"
    assert page.ask(f"({seen})(document.getElementById('list'))") == (hash == "")
    if hash:
        page.click("#back")
        page.wait(f"({seen})(document.getElementById('list'))")


def test_a_folder_that_is_not_whole_says_which_file_is_missing(chromium, folder, tmp_path):
    import shutil

    broken = tmp_path / "features"
    shutil.copytree(folder.parent, broken)
    (broken / "data-0000.js").unlink()
    chromium.open(broken / "index.html", "#feature=3")
    chromium.wait("document.querySelector('h1')?.textContent === 'This cannot be shown'")
    assert "data-0000.js cannot be read" in chromium.ask("document.getElementById('page').textContent")
