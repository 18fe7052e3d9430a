"""Promptable segmentation experts: an image is embedded once, boxes and points become masks cheaply."""
