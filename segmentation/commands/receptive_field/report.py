"""The earlier place of the functions of this folder's ``__init__.py``."""

from . import analyse_layers, analyse_network

__all__ = ["analyse_layers", "analyse_network"]
