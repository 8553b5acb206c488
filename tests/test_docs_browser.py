"""Pages of `make docs` in a browser, without a network, in light and in dark: nothing is missing, formulas
are drawn, text can be read.
"""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, run

sys.path.insert(0, str(ROOT / "docs"))
import made_pages

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

# A formula page, a page of tables, and one that is made of a docstring.
PAGES = ("formulas", "conventions", "fastreg.cross_entropy")

# Contrast is that of WCAG 2.2, 1.4.3: of each text with what is behind it.
PROBE = """<script>onload = () => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number)
  const light = color => numbers(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor
      if ((numbers(color)[3] ?? 1) === 1) return color
    }
    return "rgb(255, 255, 255)"
  }
  const contrast = element => {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x)
    return (a + 0.05) / (b + 0.05)
  }
  const seen = [...document.querySelectorAll("article p, article td, article th, article h1, article h2,"
    + "article code, article .sig span, article pre span, article a")]
    .filter(element => element.getClientRects().length && element.textContent.trim())
  const poor = seen.filter(element => contrast(element) < 4.5)
  const result = {
    dark: matchMedia("(prefers-color-scheme: dark)").matches, background: light(behind(document.body)),
    texts: seen.length,
    poor: poor.slice(0, 5).map(element => [element.outerHTML.slice(0, 90), contrast(element)]),
    formulas: [...document.querySelectorAll("math")].map(m => Math.min(...["width", "height"]
      .map(side => m.getBoundingClientRect()[side]))),
    raw: [...document.querySelectorAll("merror")].length,
    images: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
    styles: document.styleSheets.length,
    elsewhere: performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !/^(file|data):/.test(name)),
    unresolved: [...document.querySelectorAll("article a[href^='#']")].map(a => a.getAttribute("href"))
      .filter(name => name.length > 1 && !document.getElementById(decodeURIComponent(name.slice(1)))),
    sticks_out: document.documentElement.scrollWidth - innerWidth,
  }
  document.body.textContent = "RESULT" + JSON.stringify(result) + "END"
}</script>"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a few pages as docs/conf.py has them made, each with the probe at its end."""
    pytest.importorskip("sphinx", reason='needs pip install "torch-fastreg[docs]"')
    try:
        made = made_pages.made_pages()
    except ImportError:
        pytest.skip('the reference needs pip install "torch-fastreg[test]"')
    folder = tmp_path_factory.mktemp("docs")
    source = folder / "source"
    source.mkdir()
    for name in PAGES:
        page = made.get(f"reference/{name}.md") or (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        page = re.sub(
            r"^```\{literalinclude\}.*?^```$", "", page, flags=re.M | re.S
        )  # which lead out of here
        (source / f"{name}.md").write_text(page, encoding="utf-8")
    (source / "index.md").write_text("# Pages\n\n```{toctree}\n" + "\n".join(PAGES) + "\n```\n")
    # A process of its own: Sphinx is made for one run in a process.
    out, extensions = folder / "out", "myst_parser,sphinx.ext.autodoc,sphinx.ext.napoleon,made_pages,mathml"
    settings = [f"-Dextensions={extensions}", "-Dnitpicky=0", "-Dsuppress_warnings=myst.xref_missing"]
    run(sys.executable, "-m", "sphinx", "-q", "-c", ROOT / "docs", *settings, source, out)
    for name in PAGES:
        page = out / f"{name}.html"
        page.write_text(
            page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8"
        )
    return out


@pytest.mark.parametrize("scheme, width", [("light", 1366), ("dark", 1366), ("dark", 500)])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read(built, page, scheme, width, tmp_path):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom",
        (built / f"{page}.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    found = json.loads(html.unescape(re.search(r"RESULT(.*)END", done.stdout, re.DOTALL)[1]))
    assert found["dark"] is (scheme == "dark") and (found["background"] < 0.2) is found["dark"]
    assert found["elsewhere"] == found["unresolved"] == found["poor"] == [], found
    assert found["images"] == found["raw"] == 0 and found["styles"] >= 3 and found["texts"] > 20
    assert found["sticks_out"] <= 0
    if page != "conventions":
        assert len(found["formulas"]) > 2 and min(found["formulas"]) > 4
