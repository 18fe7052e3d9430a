"""The bundled tiny models and the commands that train them."""
