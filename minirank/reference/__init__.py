"""The papers in plain torch."""
