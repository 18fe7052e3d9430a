"""The grounder as a service: its HTTP API, image formats and web page."""
