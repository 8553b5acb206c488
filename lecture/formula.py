"""Formulas as inline SVG: one path each, drawn by matplotlib's mathtext, in the colour and the size of the
text around.

The page reads no font from the network and needs none for mathematics from the reader's machine, so that a
formula looks the same on a phone, in every browser and on paper."""

from html import escape

from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath

SIZE = 20  # units of the drawing per em
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def formula(tex: str) -> str:
    """An equation in matplotlib's TeX dialect, without the dollars."""
    with rc_context({"mathtext.fontset": "stix"}):
        path = TextPath((0, 0), f"${tex}$", size=SIZE, prop=FontProperties(), usetex=False)
    box = path.get_extents()
    x, y, width, height = box.x0 - 1, -box.y1 - 1, box.width + 2, box.height + 2
    drawn = "".join(
        COMMANDS[code]
        + (
            ""
            if code == Path.CLOSEPOLY
            else " ".join(f"{(-v if i % 2 else v):.2f}" for i, v in enumerate(points))
        )
        for points, code in path.iter_segments(simplify=False, curves=True)
    )
    return (
        f'<svg class="math" role="img" aria-label="{escape(tex)}" '
        f'viewBox="{x:.2f} {y:.2f} {width:.2f} {height:.2f}" '
        f'style="width:{width / SIZE:.3f}em;vertical-align:{-(y + height) / SIZE:.3f}em">'
        f'<path d="{drawn}"/></svg>'
    )
