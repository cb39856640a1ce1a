"""The methods that decide ranks, behind one interface: score() measures, allocate(budget) divides."""
