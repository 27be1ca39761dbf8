"""Write logs, metrics and traces. Imports core and galleries, of serving."""
