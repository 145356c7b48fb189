"""Taps: what a model gives away between its stages, and stage-reset forwarding."""

from .frozen import Frozen
from .hooks import strip
from .proof import leaks
from .tapped import Taps, image_size

__all__ = ["Frozen", "Taps", "image_size", "leaks", "strip"]
