"""Methods by name: from names, weights and options to the module that trains. Importing this registers them all."""

from . import bake, byot, cl, dcl, dkel, dml, kdcl, mean_teacher, okddip, one, pcl, sokd  # noqa: F401  (by name)
from .branches import Branches
from .byot import BYOT
from .create import create_method, default_losses, list_methods
from .peers import Peers
from .sokd import SOKD

__all__ = ["BYOT", "SOKD", "Branches", "Peers", "create_method", "default_losses", "list_methods"]
