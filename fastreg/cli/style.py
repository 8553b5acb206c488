"""How the pictures look: the colours of the report, and matplotlib's settings."""

INK, MUTED, GRID, PAPER = "#1c2733", "#667382", "#e3e7ec", "#ffffff"
BLUE, RUST, SAND = "#1f5fa8", "#c2521b", "#b9c2cc"  # the method in question, its opposite, the background
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": SAND,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastreg",
}
