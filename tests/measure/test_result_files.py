"""Results of anyone: text stays text in the page, each has its own pictures, and what is no result is refused."""

import copy
import html.parser
import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from pab_kernels.cli import app
from pab_kernels.measure import report, result_files

STEPS = [800.0, 600.0, 400.0, 200.0]
BAD: list[Any] = [None, 0, -1, 1.5, "x", [], {}, True, 10**400, 1e308, "x" * 20_000, [1] * 20_000, [None], {"a": None}]
MARKUP = (
    "![x](http://example.invalid/x.png)",
    "[x](http://example.invalid/)",
    "[x]: http://example.invalid/\n\n[x]",
    "<http://example.invalid/>",
    "https://example.invalid/ www.example.invalid a@example.invalid",
    "<script>x</script><img src=x onerror=y>",
    "```\n![x](http://example.invalid/x.png)",
    "`````\n<b>\n`````",
    "\\![x](http://example.invalid/x.png)",
    "\\\\[x](http://example.invalid/)",
    "x | y\n| --- | --- |\n# z\n- *a* _b_ **c** ~~d~~ &amp; &#33;[x](y)",
    'src="latte-16x512-speed.svg"',
    "$x_^$ \x1b[31m 猫",
)


def contender(name: str, pab: bool, seconds: float) -> dict[str, Any]:
    none: tuple[str, ...] = (
        "against_compile",
        "against_plain",
        "against_hook",
        "peak_bytes",
        "cache_bytes",
        "host_bytes",
        "graphs",
    )
    none += ("eager_because", "difference", "error")
    return {
        "name": name,
        "label": name,
        "pab": pab,
        "seconds": seconds,
        "runs": [seconds],
        "step_seconds": [seconds / 4] * 4,
        "ms_per_step": seconds * 250,
        "against_eager": 1.0,
        "floor_share": 0.5,
        "frames_per_second": 16 / seconds,
        "variants": {"compute": [4, seconds]},
        "difference_from": "eager",
        "warm_up_seconds": 0.1,
        **dict.fromkeys(none),
    }


@pytest.fixture
def result() -> dict[str, Any]:
    floor = {"seconds": 0.1, "seconds_fp8": None, "flops": 1e12, "bytes": 1e9}
    ceilings = {"gemm_flops": 1e12, "gemm_flops_own_tokens": 1e12, "copy_bytes": 1e10, "fp8_gemm_flops": None}
    return {
        **dict.fromkeys(("date", "dtype", "device", "command", "commit"), "words"),
        "workload": "latte-16x512",
        "video": [16, 512, 512],
        "shape": [2, 16, 1024, 1152],
        "timesteps": STEPS,
        "pab": {"spatial_broadcast": True, "spatial_threshold": [100, 900], "spatial_range": 2},
        "machine": {"gpu": "none"},
        "versions": {"python": "3"},
        "ceilings": ceilings,
        "floor": {"without PAB": floor, "with PAB": floor},
        "contenders": [contender("eager", False, 10.0), contender("runtime+pab", True, 1.0)],
        "check": {"latents": 1e-3, "prediction": 1e-3, "tolerance": 1e-2, "within": True},
    }


def put(result: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(result)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


class Page(html.parser.HTMLParser):
    """What a page would fetch, follow or run; and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            inline = (value or "").startswith("data:image/svg+xml;base64,")
            if name.startswith("on") or (name in ("src", "href") and not inline):
                self.found.append(f"<{tag} {name}={value!r}>")
        if tag in ("a", "script", "iframe", "object", "embed", "link", "base", "form", "em", "strong", "del"):
            self.found.append(f"<{tag}>")

    def handle_data(self, data: str) -> None:
        self.words += data


PLACES: tuple[tuple[Any, ...], ...] = (
    *((key,) for key in ("workload", "device", "dtype", "commit", "command", "date")),
    *(("contenders", 0, key) for key in ("label", "eager_because", "difference_from", "error")),
    ("machine", "gpu"),
    ("versions", "python"),
)


@pytest.mark.parametrize("text", MARKUP)
def test_text_is_text(text, result, tmp_path):
    allowed = Page(report.page("", {})).found
    for path in PLACES:
        result = put(result, path, text)
    result = put(put(result, ("machine", text), "x"), ("contenders", 0, "variants"), {text: [4, 1.0]})
    result["floor"] = {text: result["floor"]["with PAB"]}
    report.write([result], tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    bold = ["<strong>"]  # this runtime's time
    assert page.found == allowed + bold
    markdown = (tmp_path / "report.md").read_text()
    outside = re.sub(r"(?ms)^(`{3,})\w*$.*?^\1$", "", markdown)
    assert not re.search(r"(?<!\\)<|(?<!:\\)//|www\.|(?<![\\!])\[(?!seconds|speed|share|which|peak)", outside), outside
    words = " ".join(page.words.split())
    assert words.count(" ".join(text.split())) >= len(PLACES) - 3  # a date is cut, a difference is not shown


def test_results_of_one_workload_show_their_own_pictures(result, tmp_path):
    other = put(result, ("contenders", 1, "seconds"), 9.0)

    def pictures(folder):
        return re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', (folder / "report.html").read_text())

    names = {}
    for name, results in (("one", [result]), ("two", [other]), ("both", [result, other]), ("again", [result] * 3)):
        names[name] = [path.name for path in report.write(results, tmp_path / name)]
    assert pictures(tmp_path / "both") == pictures(tmp_path / "one") + pictures(tmp_path / "two")
    assert pictures(tmp_path / "one") != pictures(tmp_path / "two")
    assert {"latte-16x512-speed.svg", "latte-16x512-2-speed.svg", "latte-16x512-3-speed.svg"} <= set(names["again"])
    markdown = (tmp_path / "both" / "report.md").read_text()
    assert markdown.count("](latte-16x512-speed.svg)") == markdown.count("](latte-16x512-2-speed.svg)") == 1


def paths(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*start, key) for key, _ in below] + [path for key, item in below for path in paths(item, (*start, key))]


def test_every_wrong_value_is_refused_or_shown_and_never_a_traceback(result, tmp_path):
    file = tmp_path / "a.json"
    refused, accepted = [], {}
    for path in paths(result):
        if path[0] == "contenders" and path[1:2] == (1,):
            continue  # as the first
        for bad in BAD:
            file.write_text(json.dumps(put(result, path, bad)))
            try:
                found = result_files.load(file)
            except ValueError as error:
                refused.append(str(error))
                continue
            accepted[path[-2:]] = found
    assert len(refused) > 600
    assert all(message.startswith(str(file)) and len(message) < 1000 for message in refused)
    for found in accepted.values():
        report.write([found], tmp_path / "out")


def test_what_is_missing_is_named(result, tmp_path):
    file = tmp_path / "a.json"
    for path in paths(result):
        if path[0] in ("pab", "machine", "versions", "check") or isinstance(path[-1], int):
            continue
        changed = put(result, path, None)
        place: Any = changed
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        file.write_text(json.dumps(changed))
        if path[-1] in ("fp8_gemm_flops", "seconds_fp8", "without PAB", "with PAB", "compute"):
            assert result_files.load(file) == changed
            continue
        with pytest.raises(ValueError, match=f"({path[-1]}: missing, must be given|not a result)"):
            result_files.load(file)


@pytest.mark.parametrize("content", ["[" * 100_000, "", "null", "\x00", "9" * 5000, '{"a": NaN}', "\ud800"])
def test_what_is_no_result_ends_with_one_line(content, tmp_path):
    (tmp_path / "a.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert re.match(r"error: .*a\.json", done.output)
    assert not (tmp_path / "out").exists()
