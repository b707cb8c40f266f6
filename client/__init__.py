"""The client: a Python API and a command line around `protocol`."""

from client.api import Client, Prediction

__all__ = ["Client", "Prediction"]
