"""Methods: the modules that a run trains, by name; importing this package registers them."""

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
from kdtoolkit.methods.factory import create_method, list_methods
from kdtoolkit.methods.peers import Peers
from kdtoolkit.methods.resolve import default_losses
from kdtoolkit.methods.sokd import SOKD

__all__ = ["BYOT", "SOKD", "Branches", "Peers", "create_method", "default_losses", "list_methods"]
