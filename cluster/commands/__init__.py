"""Commands that are no run: `medreasoner doctor`, `data`, `expert`, and the mend of torchvision."""
