"""EoMT: queries join the last blocks of a plain transformer, which thereby segments."""
