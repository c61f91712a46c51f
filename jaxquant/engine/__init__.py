"""Products found in the trace of any function, and others put in their place."""

from jaxquant.engine.products import Product
from jaxquant.engine.walking import products, walk

__all__ = ["Product", "products", "walk"]
