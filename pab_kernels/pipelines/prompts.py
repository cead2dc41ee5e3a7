"""Cleans prompts as the originals do: what the caption of a picture on the web has beyond its words is taken out.

Open-Sora and Open-Sora-Plan have the same rules, which they apply twice, since one rule's result is another's prey.
"""

from __future__ import annotations

import html
import re
import urllib.parse

Rule = tuple[re.Pattern[str], str]

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
    "\uff0d"
)
_SIGNS = r"#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_ADDRESSES = _rules(
    ("<person>", "person"),
    # Only the scheme of an address with one, and then its domain: what follows a "?" stays.
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)
_WRITING = _rules(
    (r"@\w+\b", ""),  # names of people on a network
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and what lies among them in Unicode
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4«»“”¨]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{_SIGNS}]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINED = re.compile("[-_]")
MOST_JOINED = 3
"""Hyphens and underscores that may stay: with more of them they stand for spaces."""
_SHOPPING = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes; the second of the letters is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_prompt(prompt: str, family: str = "open_sora") -> str:
    """A prompt as the text encoder of `family` gets it: in lower case, without addresses, markup, names of files, ...

    Open-Sora takes off white space in the middle of its rules, Open-Sora-Plan ("open_sora_plan_v110" and "v120") does
    not: a sign at the beginning may then stay.
    """
    strip = not family.startswith("open_sora_plan")
    return _once(_once(prompt, strip), strip)


def _once(prompt: str, strip: bool) -> str:
    import ftfy
    from bs4 import BeautifulSoup

    text = _apply(_ADDRESSES, urllib.parse.unquote_plus(prompt).strip().lower())
    text = _apply(_WRITING, BeautifulSoup(text, features="html.parser").text)
    if len(_JOINED.findall(text)) > MOST_JOINED:
        text = _JOINED.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_SHOPPING, text.strip() if strip else text).strip()


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
