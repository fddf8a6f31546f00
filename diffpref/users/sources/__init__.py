"""Where users come from while training; SOURCES has one row each."""
