"""Preferences that no person made (Syn-Pic, Karthik et al. 2024): several pipelines draw, several scorers vote."""
