"""Answers and masks to named rewards. Pure numpy: no torch, no Ray."""
