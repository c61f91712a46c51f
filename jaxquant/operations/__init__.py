"""Products in few bits, with lax's own signatures, and the recipes that name them."""
