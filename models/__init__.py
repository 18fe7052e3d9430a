"""The bundled tiny models and the scripts that train them."""
