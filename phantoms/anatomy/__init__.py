"""One module per modality, whose `draw(rng, size) -> Canvas` paints a scene and names the structures in it.

Coordinates and lengths are in anatomy units, tones in [0, 1]. Blur is in pixels of an image of side 224 and scales with
the image.
"""
