"""What one stage does: a pure core (arrays and tables in, tables out) and one thin task entry a stage."""
