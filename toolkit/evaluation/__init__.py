"""Evidence: error rates of ordered encoder pairs with intervals, certificates, and the report. Knows no torch."""
