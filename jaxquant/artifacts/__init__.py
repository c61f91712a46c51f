"""Files: frozen models with their cards, arrays, settings and programs."""

from jaxquant.artifacts.cards import Card
from jaxquant.artifacts.folders import load, load_card, save

__all__ = ["Card", "load", "load_card", "save"]
