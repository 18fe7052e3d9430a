"""Synthetic medical images with exact masks, implicit queries and reasoning traces, drawn from a seed."""

from umrg.phantoms.dataset import rows
from umrg.phantoms.scenes import MODALITIES, STRUCTURES, Phantom, Target, draw
from umrg.phantoms.structure import Structure

__all__ = ["MODALITIES", "STRUCTURES", "Phantom", "Structure", "Target", "draw", "rows"]
