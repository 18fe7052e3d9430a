"""Promptable segmentation experts: an image is embedded once, then boxes and points are decoded into masks cheaply."""
