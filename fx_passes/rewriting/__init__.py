"""From a verified region to operators, and what becomes simpler once the loops are gone."""
