"""Methods by name: from names, weights and options to the module that trains."""

from .create import create_method, default_losses, list_methods
from .peers import Peers

__all__ = ["Peers", "create_method", "default_losses", "list_methods"]
