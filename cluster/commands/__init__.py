"""Commands that are no run: `medreasoner doctor`, `data` and `expert`, and the torchvision shim."""
