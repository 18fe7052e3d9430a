"""One module a modality: each has `draw(rng, size) -> Canvas`, that paints a scene and names its parts."""
