"""What fine-tuning adds to training: another classifier, parts that are not trained, learning rates by depth."""

from .depth import layer_numbers, rates, rule
from .freeze import StayStill, Still
from .fresh import fresh
from .heads import classifier_of, new_head, outputs

__all__ = ["StayStill", "Still", "classifier_of", "fresh", "layer_numbers", "new_head", "outputs", "rates", "rule"]
