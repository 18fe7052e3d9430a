"""The grounder for use: in this process (`Grounder`), and as a service over HTTP (`serving.app`)."""

from serving.grounder import Grounder, Grounding

__all__ = ["Grounder", "Grounding"]
