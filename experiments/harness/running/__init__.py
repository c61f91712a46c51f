"""How trials run: in processes or on Ray, each once, stopped at any point and gone on with."""
