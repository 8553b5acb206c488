"""How the pictures of demo and bench look: colours, on white and on black, and matplotlib's settings."""

PALETTE = {  # name: (on white, on black); methods take theirs by name
    "ink": ("#1c2733", "#e8edf2"),
    "muted": ("#5f6c7b", "#9aa7b4"),
    "line": ("#e3e7ec", "#2c3641"),
    "paper": ("#ffffff", "#12181f"),
    "wash": ("#f5f7f9", "#1a222b"),
    "sand": ("#b9c2cc", "#55616e"),
    "grey": ("#7d8995", "#93a0ac"),
    "blue": ("#1f5fa8", "#6ba6e8"),
    "violet": ("#7d46a8", "#bd92e0"),
    "ochre": ("#a86400", "#dca040"),
    "teal": ("#0b7a80", "#45bcc2"),
    "leaf": ("#4a7f1f", "#93c763"),
    "rust": ("#c2521b", "#ee8a58"),
    "rose": ("#b8336f", "#ec7fae"),
    "pine": ("#1b7a50", "#58c294"),
    "indigo": ("#4a51bd", "#979df0"),
    "umber": ("#7f5f2a", "#c4a36a"),
}
LIGHT = {name: white for name, (white, _) in PALETTE.items()}
INK, MUTED, GRID, PAPER = (LIGHT[name] for name in ("ink", "muted", "line", "paper"))
# The method in question, its opposite, and the background.
BLUE, RUST, SAND = (LIGHT[name] for name in ("blue", "rust", "sand"))
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
