"""Early stopping inside other people's training loops: `fastreg.integrations.lightning`, `.transformers` and
`.ignite`.

Each module holds an `EarlyStopping` that asks `fastreg.EarlyStopping` and imports its framework; fastreg
itself imports none.
"""
