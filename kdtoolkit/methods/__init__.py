"""Methods by name: from names, weights and options to the module that trains. Importing this registers them all."""

from kdtoolkit.methods import (  # noqa: F401  (by name)
    bake,
    byot,
    cl,
    dcl,
    dkel,
    dml,
    kdcl,
    mean_teacher,
    okddip,
    one,
    pcl,
    sokd,
)
from kdtoolkit.methods.branches import Branches
from kdtoolkit.methods.byot import BYOT
from kdtoolkit.methods.factory import create_method, default_losses, list_methods
from kdtoolkit.methods.peers import Peers
from kdtoolkit.methods.sokd import SOKD

__all__ = ["BYOT", "SOKD", "Branches", "Peers", "create_method", "default_losses", "list_methods"]
