"""Dense rewards (Table 2) and returns."""
