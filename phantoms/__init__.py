"""Synthetic medical images with exact masks, implicit queries and reasoning traces, drawn from a seed."""

from phantoms.dataset import rows
from phantoms.scenes import MODALITIES, STRUCTURES, Phantom, Target, draw
from phantoms.structure import Structure

__all__ = ["MODALITIES", "STRUCTURES", "Phantom", "Structure", "Target", "draw", "rows"]
