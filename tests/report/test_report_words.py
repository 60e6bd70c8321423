"""How the report writes numbers and foreign strings."""

import pytest

from crosscoder.report.page import clean_strings, escape_markdown
from crosscoder.report.table import asks, brief, format_number, format_range, linked
from crosscoder.results.table import Estimate


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (393216, "393,216"),
        (12345.6, "12,346"),
        (0.87345, "0.873"),
        (-2.0, "-2"),
        (1.5e-4, "0.00015"),
        ("AdamW", "AdamW"),
    ],
)
def test_numbers_read_well(value, shown):
    assert format_number(value) == shown


def test_a_range_without_width_has_no_brackets():
    assert format_range(Estimate(2.0, 2.0, 2.0)).detail == ""
    assert format_range(Estimate(2.0, 1.5, 2.5)).detail == "[1.5, 2.5]"
    assert format_range(Estimate(2.0, 1.9999, 2.0001)).detail == ""  # they read alike


def test_a_sentence_links_words_and_takes_values_last():
    assert linked("[A {n}](load) of {n}", n="{x} [y](z)") == [("A {x} [y](z)", "load"), (" of {x} [y](z)", None)]


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("ln in [-inf, 0]", "ln at most 0"),
        ("n / (L D) in [2, inf]", "n / (L D) at least 2"),
        ("q outside [-0.223, 0.223]", "q outside [-0.223, 0.223]"),
        ("r in [0.47, 0.916]", "r in [0.47, 0.916]"),
    ],
)
def test_requirements_have_no_infinite_ends(requirement, said):
    assert asks(requirement) == said


def test_reasons_leave_out_the_points_of_a_sweep():
    points = "0.058 (k 6, quantity 10.61), 0.044 (k 12, quantity 18.5), 0.014 (k 48, quantity 63.8)"
    reason = f"B0, crosscoder: 0.1 is not enclosed by {points}; train one of smaller k"
    assert brief(reason) == "B0, crosscoder: 0.1 is not enclosed by dictionaries of k 6 to 48; train one of smaller k"
    assert brief("not run") == "not run"


def test_control_characters_are_stripped():
    assert clean_strings({"a\x00": ["b\x1b[0m\u202ec\nd\u2028e"]}) == {"a": ["b[0mc d e"]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b ``c` *d* [e](f) <g> p_min _h_", r"a\|b \`\`c\` \*d\* [e\](f) &lt;g> p_min \_h\_"),
        ("0.948 [0.692, 1.49]: p < .05, n >= 2, 3 * 4 & [5]", "0.948 [0.692, 1.49]: p < .05, n >= 2, 3 * 4 & [5]"),
        ("asked for (`--joint`) or `a|b` here", r"asked for (`--joint`) or \`a\|b\` here"),
        ("`<b>` \\`x`", r"\`&lt;b>\` \\\`x\`"),
        ("&lt;b> <!-- x", "&amp;lt;b> &lt;!-- x"),
        ("[a](b]: https://x.org", r"\[a\](b]: https\://x.org"),
        ("# heading www.x.org", r"\# heading www\.x.org"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("--- and +5% and -3", r"\--- and +5% and -3"),
        ("-3 of $x$ and ~~struck~~", r"-3 of \$x$ and \~\~struck\~~"),
        ("> quoted", r"\> quoted"),
        (" * item", r" \* item"),
    ],
)
def test_markdown_escapes_what_would_be_markup_and_no_more(value, shown):
    assert escape_markdown(value) == shown
