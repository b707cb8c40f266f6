"""Other engines on the same network, side by side with ours: each runs in a virtual environment of its own.

`export.py`, `environments.py` and `run.py` belong to our environment. `exported.py`, `parties.py` and the programs named
`..._peer.py` run in a peer's environment and import numpy and that peer's engine only.
"""
