"""`fastreg demo`: every method of the lecture on real data, in plain PyTorch and with fastreg.

`sections/` has a file per method, `command.py` runs them, and `report.py` writes the page. `gallery.py` draws
what augmentation looks like. An installed fastreg has all of it as `fastreg.lecture`.
"""
