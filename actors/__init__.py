"""The Ray actors, the pools that keep them alive, and the engines and experts they hold."""
